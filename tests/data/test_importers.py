import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megatron_oreal.commands import prepare_data
from megatron_oreal.data.examples import Example, read_examples
from megatron_oreal.data.importers import import_examples, import_prompts
from megatron_oreal.data.prompts import read_prompts
from megatron_oreal.types import Message, Prompt

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


def test_answers_that_cannot_be_judged_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    rows = [{"question": "q", "gold_answer": answer} for answer in ("5", "$$", "6", "9^{9^{9^9}}")]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "prompts.jsonl"
    result = CliRunner().invoke(prepare_data.main, ["oreal", "--input", str(source), "--out", str(out)])
    assert result.exit_code == 2
    assert "2 of 4 answers cannot be judged; the first is row 1: answer must not be empty" in result.output
    assert not out.exists()


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


MCQ_REQUEST = "\n\nAnswer with the letter of the correct option."
GPQA_ROW = {
    "Question": "Which one? ",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "wrong, 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
    "Record ID": "rec0",
}
MMLU_PRO_ROW = {
    "question_id": 7,
    "question": "Which?",
    "options": ["x", "y", "z", "N/A"],
    "answer": "C",
    "answer_index": 2,
}


@pytest.mark.parametrize(
    ("format_name", "row", "prompt", "answer"),
    [
        ("math500", {"problem": "Find $x$.", "solution": "...", "answer": "\\frac{1}{2}"}, "Find $x$.", "\\frac{1}{2}"),
        ("math500", {"prompt": [{"from": "user", "value": "1?"}], "final_answer": "1"}, "1?", "1"),
        ("aime24", {"ID": "2024-I-1", "Problem": "How many?", "Answer": 73}, "How many?", "73"),
        ("aime24", {"id": 60, "problem": "How many?", "answer": "073", "year": "2024"}, "How many?", "073"),
        ("aime24", {"prompt": [{"from": "user", "value": "1?"}], "final_answer": "1"}, "1?", "1"),
        ("aime25", {"question": "How many?", "answer": "70"}, "How many?", "70"),
        (
            "olympiadbench",
            {"question": "Find $x$.", "context": None, "final_answer": ["$\\frac{1}{2}$"], "image_1": None},
            "Find $x$.",
            "$\\frac{1}{2}$",
        ),
        (
            "olympiadbench",
            {"question": "Find $a, b$.", "context": "Let $a<b$.", "final_answer": ["1", "2"]},
            "Let $a<b$.\n\nFind $a, b$.",
            "1, 2",
        ),
        ("livemathbench", {"question": "1+1?", "answer": "$2$", "question_type": "problem-solving"}, "1+1?", "$2$"),
        (
            "livemathbench",
            {"question": "Which?", "answer": "B", "question_type": "single-choice", "options": ["A. 1", "B. 2"]},
            "Which?\nA. 1\nB. 2",
            "B",
        ),
        ("mmlu_pro", MMLU_PRO_ROW, "Which?\n\nA. x\nB. y\nC. z" + MCQ_REQUEST, "C"),
        ("mmlu_pro", MMLU_PRO_ROW | {"answer_index": 1}, "Which?\n\nA. x\nB. y\nC. z" + MCQ_REQUEST, "C"),
    ],
)
def test_benchmark_rows(tmp_path: Path, format_name: str, row: dict[str, Any], prompt: str, answer: str) -> None:
    (imported,) = import_prompts(format_name, write_rows(tmp_path, [row]))
    assert (imported.messages, imported.answer) == ((Message("user", prompt),), answer)


def test_gpqa_options_are_shuffled_alike_each_time(tmp_path: Path) -> None:
    rows = [GPQA_ROW | {"Record ID": f"rec{number}"} for number in range(80)]
    prompts = import_prompts("gpqa", write_rows(tmp_path, rows))
    assert prompts == import_prompts("gpqa", write_rows(tmp_path, rows))
    assert (
        prompts[5:]
        == [  # whatever rows come before
            Prompt(f"rows-{number + 5}", prompt.messages, prompt.answer, None, "rows")
            for number, prompt in enumerate(import_prompts("gpqa", write_rows(tmp_path, rows[5:])))
        ]
    )
    counts = {letter: sum(prompt.answer == letter for prompt in prompts) for letter in "ABCD"}
    assert min(counts.values()) >= 10, counts
    for prompt in prompts:
        head, *options = prompt.messages[0].content.removesuffix(MCQ_REQUEST).split("\n")
        assert head == "Which one?" and f"{prompt.answer}. right" in options
        assert sorted(option[3:] for option in options[1:]) == ["right", "wrong 2", "wrong 3", "wrong, 1"]


def test_gpqa_as_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, GPQA_ROW)
        writer.writeheader()
        writer.writerow(GPQA_ROW)
    assert import_prompts("gpqa", str(path)) == import_prompts("gpqa", write_rows(tmp_path, [GPQA_ROW]))
    path.write_text("Question,Correct Answer\n")
    with pytest.raises(ValueError, match=r"^--input: .*rows\.csv has no row under its header"):
        import_prompts("gpqa", str(path))


@pytest.mark.parametrize(
    ("format_name", "row", "message"),
    [
        ("math500", {"problem": "?"}, "answer is missing"),
        ("aime25", {"answer": "1"}, "problem is missing"),
        ("aime25", {"problem": "?", "answer": None}, "answer is null"),
        (
            "olympiadbench",
            {"question": "?", "final_answer": None},
            "final_answer must be a list of strings; import the",
        ),
        (
            "olympiadbench",
            {"question": "<img_1>", "final_answer": ["1"]},
            "question has an image; import the text-only",
        ),
        ("livemathbench", {"question": "?"}, "answer is missing"),
        ("gpqa", {"Question": "?", "Correct Answer": "1"}, "Incorrect Answer 1 is missing"),
        ("mmlu_pro", MMLU_PRO_ROW | {"answer": "D"}, "answer 'D' must be the letter of one of the 3 options"),
        ("mmlu_pro", MMLU_PRO_ROW | {"answer": "AB"}, "answer 'AB' must be the letter of one of the 3 options"),
        ("mmlu_pro", MMLU_PRO_ROW | {"answer": ""}, "answer is empty"),
        ("mmlu_pro", MMLU_PRO_ROW | {"options": "x"}, "options must be a list of 2 to 26 strings"),
    ],
)
def test_benchmark_rows_without_an_answer(tmp_path: Path, format_name: str, row: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^--input: .* row 0 is not {format_name}: {message}"):
        import_prompts(format_name, write_list(tmp_path, [row]))
