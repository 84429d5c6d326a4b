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


INTERNLM_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def internlm(tmp_path: Path) -> Path:
    """As InternLM2 has it: byte fallback, a space in front of a text, chat tokens in the place of unused pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"],
        user_defined_symbols=["<eoa>"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    added = {"3": {"content": "<|im_start|>", "special": True}, "4": {"content": "<|im_end|>", "special": True}}
    settings = {"added_tokens_decoder": added, "bos_token": "<s>", "chat_template": INTERNLM_TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def configure(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | changes))


def test_bytes_stand_for_unknown_characters(internlm: Path) -> None:
    tokenizer = load_tokenizer(internlm)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(internlm / "tokenizer.model"))
    ids = tokenizer.encode("the \u732b\n")
    spelled = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in "\u732b\n".encode()]
    assert ids[-4:] == spelled and tokenizer.decode(ids) == "the \u732b\n"
    assert tokenizer.decode(ids[:-3]).startswith("the ") and "\ufffd" in tokenizer.decode(
        ids[:-2]
    )  # cut in a character
    for text in (" leading", "two  spaces ", "", "\u00e9\n\n x", "[UNUSED_TOKEN_1]"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_chat_of_internlm(internlm: Path) -> None:
    tokenizer = load_tokenizer(internlm)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(internlm / "tokenizer.model"))
    messages = [Message("user", "two plus two")]
    assert tokenizer.render_prompt(messages, PromptConfig()) == (
        "<s><|im_start|>user\ntwo plus two<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode_prompt(messages, PromptConfig()) == [
        pieces.bos_id(), 3, *pieces.encode("user\ntwo plus two"), 4, *pieces.encode("\n"), 3,
        *pieces.encode("assistant\n"),
    ]  # fmt: skip
    assert tokenizer.stop_token_ids(["<|im_end|>"]) == [pieces.eos_id(), 4]
    assert tokenizer.vocab_size == pieces.vocab_size()


def test_what_the_configuration_says_of_tokens(internlm: Path) -> None:
    added = {
        "900": {"content": "<think>", "special": False},
        "901": {"content": "<sep>", "lstrip": True, "rstrip": True},
    }
    configure(internlm, added_tokens_decoder=added, eos_token={"content": "<eoa>"})
    (internlm / "added_tokens.json").write_text(json.dumps({"<pad>": 902}))
    tokenizer = load_tokenizer(internlm)
    end = tokenizer.eos_id
    assert tokenizer.encode("<eoa>") == [end]  # also without a text before it
    assert tokenizer.encode("<think><sep><pad>") == [900, 901, 902] and tokenizer.vocab_size == 903
    assert tokenizer.encode("a  <sep>\nb") == [*tokenizer.encode("a"), 901, *tokenizer.encode("b")]
    assert tokenizer.decode([900, *tokenizer.encode("four"), 902, end]) == "<think>four"


def test_templates_by_name_and_as_transformers_renders_them(internlm: Path) -> None:
    template = "{{ messages | tojson }}{{ strftime_now('%Y') | length }}{{ unk_token }}"
    configure(internlm, chat_template=[{"name": "tool", "template": ""}, {"name": "default", "template": template}])
    rendered = load_tokenizer(internlm).render_prompt([Message("user", "<\u00e9>")], PromptConfig())
    assert rendered == '[{"role": "user", "content": "<\u00e9>"}]4<unk>'
