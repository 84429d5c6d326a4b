"""Which values of an update belong to which token, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.rollout.token_records import sample_key, token_texts, trained_values, write_token_records
from megatron_oreal.types import Group, Int32Array, Message, Prompt, Sample, TrainingSequence, Verdict

PLAN = PackingPlan(data_rank=0, data_size=1, microbatch_tokens=8, token_multiple=4)


def sample(prompt_ids: list[int], response_ids: list[int], logprob: float = -1.0) -> Sample:
    known = [logprob] * len(response_ids)
    verdict = Verdict(1.0, "correct", "1")
    return Sample("p", prompt_ids, response_ids, "", known, known, "stop", 0, verdict)  # type: ignore[arg-type]


def decode_digits(ids: Int32Array) -> str:
    return "".join(map(str, ids.tolist()))


def test_values_are_those_of_the_predicting_positions(tmp_path: Path) -> None:
    """Position t has the values of token t + 1; a filler follows the sequences, and (5; 6) is not asked for."""
    samples = [sample([1, 2], [3, 4]), sample([5], [6]), sample([1], [2, 3, 4]), sample([7], [8])]
    sequences = [TrainingSequence(s.prompt_ids, s.response_ids, 0.5, True, s.model_logprobs) for s in samples[:3]]
    batch = pack(sequences, PLAN)
    for microbatch in batch.microbatches:
        microbatch.old_logprobs = -0.1 * microbatch.labels.float()
        microbatch.token_weights = microbatch.position_ids.float()
    wanted = [samples[0], samples[2], samples[3]]
    values = trained_values([batch], {sample_key(each) for each in wanted})
    assert set(values) == {sample_key(samples[0]), sample_key(samples[2])}
    write_token_records(tmp_path / "a/step.jsonl", [group(*wanted)], values, decode_digits, "model")
    rows = [json.loads(line) for line in (tmp_path / "a/step.jsonl").read_text().splitlines()]
    # Tokens 3 and 4 after two prompt tokens are predicted from positions 1 and 2.
    assert rows[0] == {
        "row": 0, "texts": ["3", "4"], "logprobs": [-1.0, -1.0], "differences": [0.7, 0.6], "weights": [1.0, 2.0],
        "advantages": [0.5],
    }  # fmt: skip
    assert rows[1]["differences"] == [0.8, 0.7, 0.6] and rows[1]["weights"] == [0.0, 1.0, 2.0]
    assert rows[2] == {"row": 2, "texts": ["8"], "logprobs": [-1.0]}  # it was not trained on


def test_what_the_engine_does_not_tell_is_left_out(tmp_path: Path) -> None:
    known = sample([1], [2])
    unknown = TrainingSequence(known.prompt_ids, known.response_ids, 0.5, True)
    batch = pack([unknown], PLAN)
    for microbatch in batch.microbatches:
        microbatch.old_logprobs = torch.zeros(len(microbatch.labels))
    values = trained_values([batch], {sample_key(known)})
    silent = sample([1], [2])
    silent.model_logprobs = silent.rollout_logprobs = np.empty(0, np.float32)
    write_token_records(tmp_path / "step.jsonl", [group(silent)], values, decode_digits, "unknown")
    assert json.loads((tmp_path / "step.jsonl").read_text()) == {"row": 0, "texts": ["2"], "advantages": [0.5]}


def group(*samples: Sample) -> Group:
    return Group(Prompt("p", (Message("user", "?"),), "1"), list(samples))


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        ([b"a", b"b", b""], ["a", "b", ""]),
        ([b"x", b"\xe5", b"\xad", b"\x97", b"y"], ["x", "", "", "\u5b57", "y"]),
        ([b"\xf0\x9f", b"\x98\x80", b"\xf0\x9f\x98\x80!"], ["", "\U0001f600", "\U0001f600!"]),
        ([b"a", b"\xff", b"b"], ["a", "", "\ufffdb"]),  # Bytes of no character come with what follows them.
        ([b"a", b"\xe5"], ["a", "\ufffd"]),
        ([b"ab"] * 20, ["ab"] * 20),
        ([], []),
    ],
)
def test_the_texts_of_the_tokens_make_the_whole(tokens: list[bytes], texts: list[str]) -> None:
    def decode(ids: Int32Array) -> str:
        return b"".join(tokens[number] for number in ids).decode("utf-8", "replace")

    ids = np.arange(len(tokens), dtype=np.int32)
    assert token_texts(ids, decode) == texts
    assert "".join(texts) == decode(ids)


def test_a_space_that_begins_a_text_is_kept_within(tmp_path: Path) -> None:
    """Tokenizers of SentencePiece drop it, but only at the beginning of what they decode."""

    def decode(ids: Int32Array) -> str:
        return "".join(f" w{number}" for number in ids)[1:]

    assert token_texts(np.arange(12, dtype=np.int32), decode) == ["w0"] + [f" w{number}" for number in range(1, 12)]
