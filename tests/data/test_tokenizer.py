from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_oreal.config import PromptConfig
from megatron_oreal.data.tokenizer import Tokenizer, load_tokenizer
from megatron_oreal.types import Message

QUESTION = (Message("user", "How many?"),)


def test_quickstart_texts_survive_without_added_spaces(character_tokenizer: Tokenizer) -> None:
    texts = ["7+4*6-5=", "4*6=24,7+24=31,31-5=26,\\boxed{26}", "0-9*9-9=\\boxed{-90}"]
    for text in texts:
        assert character_tokenizer.decode(character_tokenizer.encode(text)) == text


def test_quickstart_answers_open_and_close_with_one_token(character_tokenizer: Tokenizer) -> None:
    ids = character_tokenizer.encode("\\boxed{-28}")
    assert len(ids) == 5  # \boxed{ - 2 8 }
    assert [character_tokenizer.decode([token]) for token in ids] == ["\\boxed{", "-", "2", "8", "}"]


def test_auto_tokenizer_agrees_on_the_quickstart(quickstart_dir: Path, character_tokenizer: Tokenizer) -> None:
    backend = AutoTokenizer.from_pretrained(quickstart_dir / "model")
    text = "8-3*0-8=3*0=0,8-0=8,8-8=0,\\boxed{0}"
    ids = backend(text)["input_ids"]
    assert ids == character_tokenizer.encode(text)
    assert backend.decode(ids) == text
    assert backend.eos_token_id == character_tokenizer.eos_id == 2


def test_special_tokens_are_not_added_and_not_decoded(character_tokenizer: Tokenizer) -> None:
    ids = character_tokenizer.encode("1+1=")
    assert len(ids) == 4
    assert character_tokenizer.decode([*ids, character_tokenizer.eos_id]) == "1+1="


def test_many_texts_are_encoded_as_one_by_one(chat_tokenizer: Tokenizer) -> None:
    texts = ["How many apples?", "", "3 pears\n\\boxed{3} é 日"]
    assert chat_tokenizer.encode_many(texts) == [chat_tokenizer.encode(text) for text in texts]
    assert [chat_tokenizer.decode(ids) for ids in chat_tokenizer.encode_many(texts)] == texts
    assert chat_tokenizer.encode_many([]) == []


def test_plain_format_joins_the_contents(chat_tokenizer: Tokenizer) -> None:
    config = PromptConfig(format="plain", system_prompt="Be brief. ", suffix=" Answer: ")
    assert chat_tokenizer.render_prompt(QUESTION, config) == "Be brief. How many? Answer: "


def test_chat_format_uses_the_template_and_opens_the_answer(chat_tokenizer: Tokenizer) -> None:
    config = PromptConfig(system_prompt="Be brief.", suffix=" Box it.")
    assert chat_tokenizer.render_prompt(QUESTION, config) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many? Box it.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = chat_tokenizer.encode_prompt(QUESTION, config)
    start = chat_tokenizer.encode("<|im_start|>")
    assert len(start) == 1 and ids.count(start[0]) == 3  # the template's marks are single tokens


def test_a_prompts_own_system_message_stays(chat_tokenizer: Tokenizer) -> None:
    messages = (Message("system", "Mine."), *QUESTION)
    assert chat_tokenizer.render_prompt(messages, PromptConfig(format="plain", system_prompt="Other.")) == (
        "Mine.How many?"
    )


def test_the_suffix_follows_the_last_user_message(chat_tokenizer: Tokenizer) -> None:
    messages = (Message("user", "A"), Message("assistant", "B"), Message("user", "C"), Message("assistant", "D"))
    assert chat_tokenizer.render_prompt(messages, PromptConfig(format="plain", suffix="!")) == "ABC!D"
    with pytest.raises(ValueError, match=r"^data\.suffix needs a user message"):
        chat_tokenizer.render_prompt((Message("assistant", "B"),), PromptConfig(format="plain", suffix="!"))


def test_chat_format_without_a_template_is_an_error(character_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^data\.format=chat: the tokenizer has no chat template; set"):
        character_tokenizer.render_prompt(QUESTION, PromptConfig())


def test_a_template_that_refuses_is_an_error_in_one_line(chat_tokenizer: Tokenizer) -> None:
    backend = chat_tokenizer.backend
    template = backend.chat_template
    backend.chat_template = "{{ raise_exception('only\none turn') }}"
    try:
        with pytest.raises(ValueError, match=r"^data\.format=chat: the chat template refuses .*\(only one turn\)"):
            chat_tokenizer.render_prompt(QUESTION, PromptConfig())
    finally:
        backend.chat_template = template


def test_stop_tokens_come_after_the_end_of_sequence_each_once(chat_tokenizer: Tokenizer) -> None:
    end, start, pad = (chat_tokenizer.encode(name)[0] for name in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"))
    assert chat_tokenizer.eos_id == end
    assert chat_tokenizer.stop_token_ids([]) == [end]
    assert chat_tokenizer.stop_token_ids(["<|im_end|>", "<|im_start|>", "<|im_start|>"]) == [end, start]
    # Also the unknown token of Qwen2's tokenizers, which is a real one.
    assert chat_tokenizer.stop_token_ids(["<|endoftext|>"]) == [end, pad]


@pytest.mark.parametrize("name", ["<|im_end|>", "x", "12", ""])
def test_a_stop_token_must_be_one_token_of_the_vocabulary(character_tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(ValueError, match=r"^rollout\.stop_tokens: .* is not one token of the vocabulary"):
        character_tokenizer.stop_token_ids([name])


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.tokenizer: .* holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}\n{")
    with pytest.raises(ValueError, match=r"^model\.tokenizer: .* cannot be loaded \(.*\); save the tokenizer again$"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_of_sequence_is_an_error(quickstart_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((quickstart_dir / "model" / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match=r"^model\.tokenizer: .* names no eos_token"):
        load_tokenizer(tmp_path)
