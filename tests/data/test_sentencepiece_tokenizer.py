"""Bare sentencepiece models, trained here on a few lines."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_oreal.config import PromptConfig
from megatron_oreal.data.tokenizer import load_tokenizer
from megatron_oreal.types import Message

CORPUS = ["what is two plus two", "the answer is four", "a b c d e f g h i j k l m n o p q r s t u v w x y z", "12 + 3"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=90,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    added = {"200": {"content": "<|im_start|>"}, "201": {"content": "<|im_end|>", "special": True}}
    settings = {"added_tokens_decoder": added, "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_text_goes_there_and_back_and_special_tokens_are_one_id(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "the answer is two  plus four"
    assert tokenizer.encode(text) == pieces.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(f"<|im_start|>{text}<|im_end|></s>")
    assert ids == [200, *pieces.encode(text), 201, pieces.eos_id()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 202 and tokenizer.eos_id == pieces.eos_id()


def test_chat_template_and_stop_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    messages = [Message("user", "two plus two")]
    assert tokenizer.render_prompt(messages, PromptConfig()) == (
        "<|im_start|>user\ntwo plus two<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode_prompt(messages, PromptConfig())[0] == 200
    assert tokenizer.stop_token_ids(["<|im_end|>"]) == [tokenizer.eos_id, 201]
    with pytest.raises(ValueError, match="not one token"):
        tokenizer.stop_token_ids(["two plus"])


def test_a_refusing_template_and_a_broken_model_are_users_mistakes(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system prompt') }}")
    with pytest.raises(ValueError, match="no system prompt"):
        load_tokenizer(folder).render_prompt([Message("user", "x")], PromptConfig())
    (folder / "tokenizer.model").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"model\.tokenizer"):
        load_tokenizer(folder)
