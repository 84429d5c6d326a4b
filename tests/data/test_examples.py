from pathlib import Path

import pytest

from megatron_oreal.config import SftDataConfig
from megatron_oreal.data.examples import Example, encode_examples, read_examples, write_examples
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.types import Message

SHORT = Example((Message("user", "1+1="),), "\\boxed{2}")  # 4 + 3 tokens
LONG = Example((Message("user", "1+1+1="),), "1+1=2,2+1=3,\\boxed{3}")  # 6 + 15 tokens


def plain_config(max_prompt_tokens: int, max_tokens: int) -> SftDataConfig:
    return SftDataConfig(
        examples=Path("unused"), format="plain", max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens
    )


def test_written_examples_are_read_back(tmp_path: Path) -> None:
    conversation = Example((Message("system", "Think."), Message("user", "1+1=")), "2\n")
    assert write_examples(tmp_path / "sft.jsonl", [SHORT, conversation]) == 2
    assert read_examples(tmp_path / "sft.jsonl") == [SHORT, conversation]


def test_a_malformed_example_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"^data\.examples: .*sft\.jsonl line 2: response is missing"):
        read_examples(path)


def test_a_sequence_ends_with_the_end_of_sequence(character_tokenizer: Tokenizer) -> None:
    (sequence,), num_skipped = encode_examples([SHORT], character_tokenizer, plain_config(100, 100))
    assert num_skipped == 0
    assert character_tokenizer.decode(sequence.prompt_ids) == "1+1="
    assert character_tokenizer.decode(sequence.response_ids) == "\\boxed{2}"
    assert sequence.response_ids[-1] == character_tokenizer.eos_id
    assert sequence.num_tokens == 4 + 3 + 1
    assert (sequence.advantage, sequence.is_correct) == (1.0, True)


# SHORT has 4 prompt tokens and 8 in all, LONG 6 and 22.
@pytest.mark.parametrize(
    ("max_prompt_tokens", "max_tokens", "num_kept"), [(6, 22, 2), (5, 22, 1), (6, 21, 1), (4, 8, 1)]
)
def test_too_long_examples_are_counted(
    character_tokenizer: Tokenizer, max_prompt_tokens: int, max_tokens: int, num_kept: int
) -> None:
    config = plain_config(max_prompt_tokens, max_tokens)
    sequences, num_skipped = encode_examples([SHORT, LONG], character_tokenizer, config)
    assert (len(sequences), num_skipped) == (num_kept, 2 - num_kept)


def test_only_too_long_examples_are_an_error(character_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^data\.max_tokens=7, .*each of the 2 examples is longer"):
        encode_examples([SHORT, LONG], character_tokenizer, plain_config(100, 7))


def test_a_prompt_without_a_token_is_named(character_tokenizer: Tokenizer) -> None:
    nothing = Example((Message("user", ""),), "2")
    with pytest.raises(ValueError, match=r"^data\.examples: the prompt of example 2 gives no token"):
        encode_examples([SHORT, nothing], character_tokenizer, plain_config(10, 10))
