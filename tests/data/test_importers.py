import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megatron_oreal.data.examples import Example, read_examples
from megatron_oreal.data.importers import import_examples, import_prompts
from megatron_oreal.data.prompts import read_prompts
from megatron_oreal.types import Message, Prompt
from tools import prepare_data

GSM8K_ROW = {
    "question": "Two boxes hold 500 pens each, and 24 are sold. How many are left?",
    "answer": "There were 2*500=<<2*500=1000>>1,000 pens.\nSo 1000-24=<<1000-24=976>>976.\n#### 1,976",
}


def write_rows(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_list(folder: Path, rows: object) -> str:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return str(path)


def test_gsm8k_answers_are_plain_numbers(tmp_path: Path) -> None:
    (prompt,) = import_prompts("gsm8k", write_rows(tmp_path, [GSM8K_ROW]))
    assert prompt == Prompt("rows-0", (Message("user", GSM8K_ROW["question"]),), "1976", None, "rows")


@pytest.mark.parametrize(
    ("text", "answer"), [("-5", "-5"), ("$20", "20"), ("$ 20", None), (".5", ".5"), ("1.50", "1.50"), ("", None)]
)
def test_gsm8k_answers_of_other_forms(tmp_path: Path, text: str, answer: str | None) -> None:
    source = write_rows(tmp_path, [{"question": "?", "answer": f"Because.\n#### {text}"}])
    if answer is None:
        with pytest.raises(ValueError, match="row 0 is not gsm8k: answer must end with"):
            import_prompts("gsm8k", source)
    else:
        assert import_prompts("gsm8k", source)[0].answer == answer


def test_gsm8k_solutions_lose_their_marks_and_box_the_answer(tmp_path: Path) -> None:
    (example,) = import_examples("gsm8k", write_rows(tmp_path, [GSM8K_ROW]))
    response = "There were 2*500=1,000 pens.\nSo 1000-24=976.\n\\boxed{1976}"
    assert example == Example((Message("user", GSM8K_ROW["question"]),), response)


def test_orz_evaluation_rows(tmp_path: Path) -> None:
    row = {"prompt": [{"from": "user", "value": "Find $x$."}], "final_answer": "\\frac{1}{2}"}
    (prompt,) = import_prompts("orz", write_list(tmp_path, [row]))
    assert prompt == Prompt("rows-0", (Message("user", "Find $x$."),), "\\frac{1}{2}", None, "rows")


def test_orz_training_rows(tmp_path: Path) -> None:
    row = [{"from": "human", "value": "1+1?"}, {"from": "assistant", "ground_truth": {"value": "2"}}]
    (prompt,) = import_prompts("orz", write_list(tmp_path, [row]))
    assert (prompt.messages, prompt.answer) == ((Message("user", "1+1?"),), "2")


def test_oreal_rows_keep_their_pass_rate(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "gold_answer": "2", "pass_rate": 0.25}, {"question": "2+2?", "gold_answer": 4}]
    prompts = import_prompts("oreal", write_rows(tmp_path, rows))
    assert [(prompt.id, prompt.answer, prompt.pass_rate) for prompt in prompts] == [
        ("rows-0", "2", 0.25),
        ("rows-1", "4", None),
    ]


@pytest.mark.parametrize(
    ("format_name", "row"),
    [
        ("gsm8k", {"question": "?", "answer": "no mark"}),
        ("gsm8k", {"answer": "#### 1"}),
        ("gsm8k", ["?"]),
        ("orz", {"question": "?"}),
        ("orz", []),
        ("orz", [{"from": "user", "value": "?"}]),
        ("orz", {"prompt": [{"from": "robot", "value": "?"}], "final_answer": "1"}),
        ("orz", {"prompt": [{"from": "user"}], "final_answer": "1"}),
        ("oreal", {"question": "?", "gold_answer": ""}),
        ("oreal", {"question": "?", "gold_answer": "1", "pass_rate": 7}),
    ],
)
def test_a_row_of_another_format_is_named(tmp_path: Path, format_name: str, row: object) -> None:
    with pytest.raises(ValueError, match=rf"^--input: .*rows\.json row 0 is not {format_name}: "):
        import_prompts(format_name, write_list(tmp_path, [row]))


def test_a_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "gold_answer": str(i)} for i in range(5)]
    assert [prompt.answer for prompt in import_prompts("oreal", write_rows(tmp_path, rows), limit=2)] == ["0", "1"]


@pytest.mark.parametrize("content", ["{}", "[]", "[", "3"])
def test_a_json_file_must_hold_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^--input: .*(must hold a non-empty list of rows|is not JSON)"):
        import_prompts("orz", str(path))


def test_unknown_formats_and_missing_solutions_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FORMAT 'gsm9k' is not known; known: gsm8k, orz, oreal"):
        import_prompts("gsm9k", "rows.jsonl")
    with pytest.raises(ValueError, match=r"^--sft: oreal holds answers without solutions; .*: gsm8k"):
        import_examples("oreal", "rows.jsonl")
    with pytest.raises(ValueError, match=r"none\.jsonl is not a file"):
        import_prompts("gsm8k", str(tmp_path / "none.jsonl"))


def test_the_command_writes_prompts_and_examples(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [GSM8K_ROW, GSM8K_ROW])
    for arguments in (["--out", str(tmp_path / "p.jsonl")], ["--out", str(tmp_path / "e.jsonl"), "--sft"]):
        result = CliRunner().invoke(prepare_data.main, ["gsm8k", "--input", source, *arguments])
        assert result.exit_code == 0, result.output
    assert [prompt.id for prompt in read_prompts(tmp_path / "p.jsonl", "data.prompts")] == ["rows-0", "rows-1"]
    assert len(read_examples(tmp_path / "e.jsonl")) == 2


def test_the_command_ends_with_one_line_and_no_file(tmp_path: Path) -> None:
    source = write_rows(tmp_path, [GSM8K_ROW])
    result = CliRunner().invoke(prepare_data.main, ["oreal", "--input", source, "--out", str(tmp_path / "p.jsonl")])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: --input: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "p.jsonl").exists()
