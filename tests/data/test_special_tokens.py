"""Special tokens of prompts, examples and responses: where they are written, kept, and where a name is only text."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as BareTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_oreal.config import PromptConfig, SftDataConfig
from megatron_oreal.data.examples import Example, encode_examples
from megatron_oreal.data.prompts import encode_prompts
from megatron_oreal.data.tokenizer import Tokenizer, load_tokenizer
from megatron_oreal.types import Message, Prompt
from tests.support.small_tokenizers import (
    BOS,
    END_THINK,
    EOS,
    IM_END,
    PAD,
    THINK,
    characters,
    post_processor,
    small_tokenizer,
)

PLAIN, TEMPLATE = PromptConfig(format="plain"), PromptConfig(format="template", template="Q: {prompt}")
SUM = [Message("user", "1+2=")]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return small_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("post", "prefix"),
    [
        (None, []),
        (post_processor(["<s>"], []), [BOS]),
        (post_processor(["<s>"], ["</s>"]), [BOS]),  # a prompt does not end
        (post_processor([], ["</s>"]), []),
        (post_processor(["<s>", "<pad>"], []), [BOS, PAD]),
    ],
)
def test_prompts_without_a_chat_template_begin_as_the_tokenizer_begins_them(
    tmp_path: Path, post: dict[str, Any] | None, prefix: list[int]
) -> None:
    tokenizer = small_tokenizer(tmp_path, post)
    expected = [*prefix, *characters("1+2=")]
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path)("1+2=")["input_ids"]
    assert own[: len(expected)] == expected
    assert tokenizer.encode_prompt(SUM, PLAIN) == expected
    assert tokenizer.encode_prompt(SUM, PromptConfig(format="template", template="{prompt}")) == expected
    assert tokenizer.encode_prompt(SUM, PromptConfig()) == tokenizer.encode(
        tokenizer.render_prompt(SUM, PromptConfig())
    )
    prompts, _ = encode_prompts([Prompt("p", tuple(SUM), "3")], tokenizer, PLAIN)
    assert prompts[0].token_ids.tolist() == expected
    sequences, _ = encode_examples(
        [Example(tuple(SUM), "3")], tokenizer, SftDataConfig(examples=tmp_path, format="plain")
    )
    assert sequences[0].prompt_ids.tolist() == expected
    assert sequences[0].response_ids.tolist() == [*characters("3"), EOS]


def test_a_template_that_writes_bos_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path, post_processor(["<s>"], []))
    config = PromptConfig(format="template", template="<s>{prompt}<think>")
    assert tokenizer.encode_prompt(SUM, config) == [BOS, *characters("1+2="), THINK]


def test_a_prompt_without_text_is_refused_with_bos_too(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path, post_processor(["<s>"], []))
    with pytest.raises(ValueError, match="prompt 'p' gives no token"):
        encode_prompts([Prompt("p", (Message("user", ""),), "3")], tokenizer, PLAIN)


@pytest.mark.parametrize("text", ["1<|im_end|>2", "</s>", "<s>1", "<think>", "<|im_end|><|im_end|>", "1\ue0000\ue0012"])
def test_names_of_special_tokens_in_messages_are_text(tokenizer: Tokenizer, text: str) -> None:
    messages = [Message("user", text)]
    content = [1 if character in "\ue000\ue001" else characters(character)[0] for character in text]
    assert tokenizer.encode_prompt(messages, PLAIN) == content
    template = PromptConfig(format="template", template="1{prompt}</s>2")
    assert tokenizer.encode_prompt(messages, template) == [*characters("1"), *content, EOS, *characters("2")]
    opening = [*characters("a "), THINK, *characters("\n")]
    assert tokenizer.encode_prompt(messages, PromptConfig()) == [*characters("u "), *content, IM_END, *opening]
    assert tokenizer.render_prompt(messages, PLAIN) == text  # the placeholders are gone


def test_the_configuration_may_name_special_tokens(tokenizer: Tokenizer) -> None:
    config = PromptConfig(format="plain", system_prompt="<s>", suffix="<think>")
    messages = [Message("user", "1<s>")]
    assert tokenizer.encode_prompt(messages, config) == [BOS, *characters("1<s>"), THINK]


def test_a_vocabulary_of_words_that_has_the_name_too(tmp_path: Path) -> None:
    words = {"<unk>": 0, "</s>": 1, "<s>": 2, "one": 3, "two": 4}
    bare = BareTokenizer(models.WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    ids = load_tokenizer(tmp_path).encode_prompt([Message("user", "one </s> two")], PLAIN)
    assert 1 not in ids and ids[0] == 3 and ids[-1] == 4


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>\n1</think>2", "1</think>2"),
        ("<think>1</think>2", "1</think>2"),
        ("\n<think>\n1</think>2", "1</think>2"),
        ("1</think>2", "1</think>2"),
        ("</think>2", "</think>2"),
        ("1<think>", "1<think>"),
    ],
)
def test_an_opening_mark_is_not_doubled(tokenizer: Tokenizer, response: str, expected: str) -> None:
    examples = [Example(tuple(SUM), response)]
    sequences, _ = encode_examples(examples, tokenizer, SftDataConfig(examples=Path("e")))
    assert sequences[0].prompt_ids.tolist()[-2:] == [THINK, *characters("\n")]
    assert sequences[0].response_ids.tolist() == [*tokenizer.encode(expected), EOS]
    plain, _ = encode_examples(examples, tokenizer, SftDataConfig(examples=Path("e"), format="plain"))
    assert plain[0].response_ids.tolist() == [*tokenizer.encode(response), EOS]  # the prompt opens nothing


def test_text_of_a_response_keeps_reasoning_marks_and_no_other_special_token(tokenizer: Tokenizer) -> None:
    ids = [BOS, THINK, *characters("1"), END_THINK, *characters("2"), IM_END, PAD, EOS]
    assert tokenizer.decode(ids) == "<think>1</think>2"
    assert tokenizer.decode([*characters("12"), EOS]) == "12"


def test_stop_strings_that_cannot_occur_are_refused(tokenizer: Tokenizer) -> None:
    tokenizer.check_stop_strings(["</think>", "1 =", "\n\n"])
    with pytest.raises(ValueError, match=r"^rollout\.stop_strings: '1é' can never occur, since no token has 'é'"):
        tokenizer.check_stop_strings(["12", "1é"])
    with pytest.raises(ValueError, match=r"^rollout\.stop_strings: '<\|im_end\|>' is a special token, .*stop_tokens"):
        tokenizer.check_stop_strings(["<|im_end|>"])


def test_bytes_spell_every_stop_string(chat_tokenizer: Tokenizer) -> None:
    chat_tokenizer.check_stop_strings(["é 日本", "User:", "\u200b"])
