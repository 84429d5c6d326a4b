"""The judge on a real SGLang server, whose model is made by hand: it accepts answers that end with the digit 2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedModel

from megatron_oreal.config import JudgeConfig, SglangConfig
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.servers.fleet import open_servers
from megatron_oreal.engines.sglang.servers.process import ServerSettings
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rewards.judge import Judge
from megatron_oreal.rewards.judged_verifier import JudgedVerifier
from megatron_oreal.types import Message, Prompt, Verdict
from tests.support.paths import SGLANG_PYTHON
from tests.support.tiny_models import write_tiny_model

VOCABULARY = ["<pad>", "<eos>", *map(chr, range(32, 127)), "\n", "CORRECT", "INCORRECT"]
END, TWO, ACCEPTS, REJECTS = 1, VOCABULARY.index("2"), len(VOCABULARY) - 2, len(VOCABULARY) - 1


def write_weights(model: PreTrainedModel) -> None:
    """The layers add nothing, so the next token is a function of the last one: 2 -> CORRECT -> end."""
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embeddings[:, 0] = 1.0
    for tokens, place in (([TWO], 1), ([ACCEPTS, REJECTS], 2)):
        embeddings[tokens, 0] = 0.0
        embeddings[tokens, place] = 1.0
    for token, place in ((REJECTS, 0), (ACCEPTS, 1), (END, 2)):
        head[token, place] = 10.0


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("judge")
    size = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 512, "pad_token_id": 0}
    path = write_tiny_model(folder / "model", tied=False, num_layers=1, fill=write_weights, **size)
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(VOCABULARY[:-2])}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in VOCABULARY[:2]])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in VOCABULARY[-2:]])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    settings["chat_template"] = "{{ messages[-1]['content'] }}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = SglangConfig(python=SGLANG_PYTHON, start_timeout_seconds=280)
    with open_servers(ServerSettings(config, path, "float32", folder, "cpu", context_length=512), print) as fleet:
        (found,) = fleet.endpoints
        yield found


@pytest.mark.sglang
def test_a_real_server_is_a_judge(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", endpoint.api_key)
    prompt = Prompt("p", (Message("user", "What is 1 + 1?"),), "2")
    for api in ("chat", "completions"):
        config = JudgeConfig(
            url=f"{endpoint.url}/v1",
            model="judge",
            api=api,
            api_key_env="JUDGE_KEY",
            prompt="{question} {reference} {answer}",
            max_tokens=8,
        )
        judge = Judge(config, tmp_path / "judge.sqlite", print)
        with MathVerifier() as rules, JudgedVerifier(rules, judge) as verifier:
            verifier.check()
            verdicts = verifier.verify_responses(prompt, [r"\boxed{n=3-1 or 2}", r"\boxed{3}", r"\boxed{2}"])
        assert verdicts == [
            Verdict(1.0, "correct", "n=3-1 or 2", rules="incorrect", judge="correct"),
            Verdict(0.0, "incorrect", "3", rules="incorrect", judge="incorrect"),
            Verdict(1.0, "correct", "2"),
        ]
    monkeypatch.setenv("JUDGE_KEY", "another")
    notes: list[str] = []
    refused = Judge(config.model_copy(update={"max_tokens": 9}), tmp_path / "judge.sqlite", notes.append)
    with MathVerifier() as rules, JudgedVerifier(rules, refused) as verifier:
        assert verifier.verify_responses(prompt, [r"\boxed{3}"])[0].status == "judge_failed"
    assert "401" in notes[0]
