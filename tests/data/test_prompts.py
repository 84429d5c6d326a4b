import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.config import PromptConfig
from megatron_oreal.data.prompts import (
    PromptCursor,
    Turn,
    encode_prompts,
    read_prompts,
    repeat_by_pass_rate,
    write_prompts,
)
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.types import Message, Prompt

PLAIN = PromptConfig(format="plain")
ROW = {"id": "a", "prompt": "1+1=", "answer": "2"}


def make_prompt(prompt_id: str, text: str = "1+1=", pass_rate: float | None = None) -> Prompt:
    return Prompt(prompt_id, (Message("user", text),), "2", pass_rate)


def read_rows(folder: Path, *rows: dict[str, Any]) -> list[Prompt]:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(path, "data.prompts")


def test_a_string_is_one_user_message_and_optional_keys_have_defaults(tmp_path: Path) -> None:
    assert read_rows(tmp_path, ROW | {"ignored": 1}) == [Prompt("a", (Message("user", "1+1="),), "2", None, "")]


def test_metadata_is_an_object_and_is_written_back(tmp_path: Path) -> None:
    prompts = read_rows(tmp_path, ROW | {"meta": {"limit": [1, {"a": None}]}}, ROW | {"id": "b", "meta": None})
    assert [prompt.metadata for prompt in prompts] == [{"limit": [1, {"a": None}]}, {}]
    write_prompts(tmp_path / "out.jsonl", prompts)
    assert read_prompts(tmp_path / "out.jsonl", "data.prompts") == prompts
    assert "meta" not in json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])
    with pytest.raises(ValueError, match="line 1: meta must be an object, not "):
        read_rows(tmp_path, ROW | {"meta": "x"})


def test_numbers_are_read_as_their_text(tmp_path: Path) -> None:
    prompt = read_rows(tmp_path, {"id": 7, "prompt": "1+1=", "answer": 2.5, "pass_rate": 1})[0]
    assert (prompt.id, prompt.answer, prompt.pass_rate) == ("7", "2.5", 1.0)


def test_written_prompts_are_read_back(tmp_path: Path) -> None:
    messages = (Message("system", "Think."), Message("user", "$\\frac{1}{2}$?"))
    prompts = [Prompt("a", messages, "\\frac12", 0.25, "source"), make_prompt("b")]
    assert write_prompts(tmp_path / "out.jsonl", prompts) == 2
    assert read_prompts(tmp_path / "out.jsonl", "data.prompts") == prompts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "answer is null; give a non-empty string"),
        ({"answer": "  "}, "answer is empty; give a non-empty string"),
        ({"answer": True}, "answer must be a string, not a boolean"),
        ({"id": {}}, "id must be a string, not an object"),
        ({"prompt": []}, "prompt is empty; give a string or a list"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": None}, "prompt is null"),
        ({"prompt": 0}, "prompt must be a string or a list of .*, not a number"),
        ({"prompt": 3}, "prompt must be a string or a list of .*, not a number"),
        ({"prompt": [{"role": "user"}]}, "each message of prompt must be"),
        ({"prompt": ["hello"]}, "each message of prompt must be"),
        ({"pass_rate": 1.5}, "pass_rate must be a number from 0 to 1, or null, got 1.5"),
        ({"pass_rate": float("nan")}, "pass_rate must be a number"),
        ({"answer": "$$"}, "answer must not be empty"),
        ({"answer": r"\boxed{}"}, "answer must not be empty"),
        ({"answer": "1" * 1001}, "answer must be at most 1000 characters long, got 1001"),
        ({"answer": r"\frac{1}{2"}, "answer has braces without their partners"),
        ({"answer": "9^{9^{9^9}}"}, "answer holds an exponent beyond all measure"),
        ({"answer": "1/2=0.6"}, "answer contradicts itself"),
        ({"answer": float("nan")}, "answer is the number nan; write it as a string"),
        ({"answer": float("inf")}, "answer is the number inf; write it as a string"),
        ({"answer": 1e22}, r"answer is the number 1e\+22; write it as a string"),
        ({"source": 1}, "source must be a string, not a number"),
        ({"id": "first"}, "id 'first' occurs twice; ids must be unique"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.prompts: .*prompts\.jsonl line 2: {message}"):
        read_rows(tmp_path, ROW | {"id": "first"}, ROW | change)


def test_too_long_prompts_are_counted(character_tokenizer: Tokenizer) -> None:
    prompts = [make_prompt("a", "1+1="), make_prompt("b", "1+1+1="), make_prompt("c", "2+1=")]
    config = PromptConfig(format="plain", max_prompt_tokens=4)
    encoded, num_skipped = encode_prompts(prompts, character_tokenizer, config)
    assert num_skipped == 1
    assert [item.prompt.id for item in encoded] == ["a", "c"]
    assert [character_tokenizer.decode(item.token_ids) for item in encoded] == ["1+1=", "2+1="]


def test_only_too_long_prompts_are_an_error(character_tokenizer: Tokenizer) -> None:
    config = PromptConfig(format="plain", max_prompt_tokens=3)
    with pytest.raises(ValueError, match=r"^data\.max_prompt_tokens=3: each of the 2 prompts is longer; raise it to 4"):
        encode_prompts([make_prompt("a"), make_prompt("b", "1+1+1=")], character_tokenizer, config)


def test_repeats_follow_the_pass_rate() -> None:
    rates = [0.0, 0.19, 0.2, 0.59, 0.6, 0.8, 1.0, None]
    prompts = [make_prompt(str(rate), pass_rate=rate) for rate in rates]
    repeated = repeat_by_pass_rate(prompts, [(0.2, 6), (0.6, 4), (0.8, 2)])
    assert Counter(prompt.id for prompt in repeated) == {"0.0": 6, "0.19": 6, "0.2": 4, "0.59": 4, "0.6": 2, "None": 1}


def test_a_rule_may_drop_prompts_and_no_rule_keeps_all() -> None:
    prompts = [make_prompt("never", pass_rate=0.0), make_prompt("half", pass_rate=0.5)]
    assert [prompt.id for prompt in repeat_by_pass_rate(prompts, [(0.1, 0), (0.9, 1)])] == ["half"]
    assert repeat_by_pass_rate(prompts, []) == prompts


def test_rules_that_drop_everything_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^data\.repeats_by_pass_rate drops each of the 1 prompts"):
        repeat_by_pass_rate([make_prompt("a", pass_rate=0.9)], [(0.5, 2)])


def test_each_epoch_has_every_item_once_in_its_own_order() -> None:
    cursor = PromptCursor(range(20), shuffle=True, seed=0)
    epochs = []
    for epoch in range(3):
        assert cursor.epoch == epoch
        epochs.append(cursor.next_batch(20))
    assert all(sorted(items) == list(range(20)) for items in epochs)
    assert len({tuple(items) for items in [*epochs, range(20)]}) == 4


def test_without_shuffling_batches_run_across_the_epochs_border() -> None:
    cursor = PromptCursor("abc", shuffle=False, seed=0)
    assert [cursor.next_batch(2) for _ in range(3)] == [["a", "b"], ["c", "a"], ["b", "c"]]
    assert cursor.epoch == 2
    assert cursor.next_batch(7) == list("abcabca")


def test_seeds_give_different_orders_and_the_same_seed_the_same() -> None:
    first, again, other = (PromptCursor(range(20), shuffle=True, seed=seed).next_batch(20) for seed in (1, 1, 2))
    assert first == again != other


# 10 items in batches of 4: stops inside an epoch, right at a border (after 5 batches), and beyond it.
@pytest.mark.parametrize("num_batches_before", [0, 1, 2, 3, 5, 7])
def test_a_restored_cursor_continues_the_unbroken_order(num_batches_before: int) -> None:
    unbroken = PromptCursor(range(10), shuffle=True, seed=3)
    expected = [unbroken.next_batch(4) for _ in range(12)]

    killed = PromptCursor(range(10), shuffle=True, seed=3)
    before = [killed.next_batch(4) for _ in range(num_batches_before)]
    state = json.loads(json.dumps(killed.state()))
    resumed = PromptCursor(range(10), shuffle=True, seed=99)  # the saved seed counts
    resumed.restore(state)
    after = [resumed.next_batch(4) for _ in range(12 - num_batches_before)]
    assert before + after == expected
    assert resumed.state() == unbroken.state()


def test_what_is_given_back_comes_first_also_after_a_restart() -> None:
    cursor = PromptCursor("abcdef", shuffle=False, seed=0)
    first = cursor.next_turns(4)
    cursor.give_back([Turn(first[1].index, "0/0/1"), Turn(first[3].index)])
    state = json.loads(json.dumps(cursor.state()))
    resumed = PromptCursor("abcdef", shuffle=False, seed=0)
    resumed.restore(state)
    for continued in (cursor, resumed, resumed.copy()):
        assert continued.copy().next_turns(1) == [Turn(1, "0/0/1")]
        assert continued.copy().next_batch(5) == list("bdefa")
        assert continued.state() == state
    before = {name: value for name, value in state.items() if name != "returned"}  # of an older checkpoint
    resumed.restore(before)
    assert resumed.next_batch(2) == list("ef")


def test_a_state_of_other_prompts_is_refused() -> None:
    state = PromptCursor(range(10), shuffle=True, seed=0).state()
    with pytest.raises(ValueError, match=r"^data\.prompts: the run was saved with 10 prompts an epoch and now has 9"):
        PromptCursor(range(9), shuffle=True, seed=0).restore(state)


def test_a_cursor_needs_an_item() -> None:
    with pytest.raises(ValueError, match=r"data\.prompts holds no prompt"):
        PromptCursor([], shuffle=True, seed=0)


def test_a_row_without_a_prompt_names_the_keys_that_it_has(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "1", "question": "1+1=", "answer": "2"}\n')
    with pytest.raises(
        ValueError, match=r"line 1: prompt is missing; give a .*; the keys found are id, question, answer$"
    ):
        read_prompts(file, "data.prompts")
    file.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"line 1: id is missing; give a .*; the keys found are prompt, answer$"):
        read_prompts(file, "data.prompts")
    file.write_text(json.dumps({f"key{number}" * 20: 0 for number in range(30)}) + "\n")
    with pytest.raises(ValueError, match=r"id is missing; .* (key\w{37}, ){10}\.\.\.$"):
        read_prompts(file, "data.prompts")
