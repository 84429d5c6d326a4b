"""Rows in the layouts of public training sets, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.data.importers import import_examples, import_prompts, import_rows
from megatron_oreal.data.importing import DataFormat
from megatron_oreal.data.sources import open_source
from megatron_oreal.data.training_sets import Columns
from megatron_oreal.types import Message

DAPO_HEAD = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "{} (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'


def dapo_row(question: str, answer: object, index: str, box: str = "$Answer") -> dict[str, Any]:
    content = DAPO_HEAD.format(box) + question + DAPO_TAIL
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def math_row(solution: str | None, problem: str = "Find $x$.") -> dict[str, Any]:
    return {"problem": problem, "level": "Level 3", "type": "Algebra", "solution": solution}


def write_rows(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("So $x=\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("First \\boxed{1}, then $\\boxed{\\sqrt{\\text{a}}}$.", "\\sqrt{\\text{a}}"),
        ("The answer is $\\boxed 5$.", "5"),
        ("$\\fbox{C}$", "C"),
        ("x = 5", None),
        ("$\\boxed{5", None),
        ("", None),
        (None, None),
    ],
)
def test_the_answer_of_math_is_its_solutions_last_box(tmp_path: Path, solution: str | None, answer: str | None) -> None:
    source = write_rows(tmp_path, [math_row(solution)])
    if answer is None:
        with pytest.raises(ValueError, match=r"line 1: row 0 is not math: solution .*columns found are problem, level"):
            import_prompts("math", source)
    else:
        assert import_prompts("math", source)[0].answer == answer
        assert import_examples("math", source)[0].response == solution


def test_dapo_rows_lose_their_instructions_and_repeats(tmp_path: Path) -> None:
    rows = [dapo_row("What is $2+3$?", "5", "a"), dapo_row("求 $x$。\n\n$x=1$", "1", "b", "\\boxed{$Answer}")] * 100
    source = write_rows(tmp_path, rows)
    assert [(p.id, p.messages, p.answer) for p in import_prompts("dapo", source)] == [
        ("rows-0", (Message("user", "What is $2+3$?"),), "5"),
        ("rows-1", (Message("user", "求 $x$。\n\n$x=1$"),), "1"),
    ]
    assert len(import_prompts("dapo", source, limit=1)) == 1


def test_a_dapo_question_without_instructions_stays_as_it_is(tmp_path: Path) -> None:
    row = dapo_row("", "5", "a") | {"prompt": "Solve it.\n"}
    assert import_prompts("dapo", write_rows(tmp_path, [row]))[0].messages[0].content == "Solve it.\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dapo_row("", "5", "a"), "prompt holds no question between its instructions"),
        (dapo_row("x", ["5"], "a"), "ground_truth must be a string, not a list"),
        (dapo_row("x", None, "a"), "ground_truth is null"),
        (dapo_row("x", "5", "a") | {"reward_model": "5"}, "reward_model must be .* not a string"),
        ({"problem": "x", "answer": "5"}, "prompt is missing; .* the columns found are problem, answer"),
        ([1], "the row is not of this format"),
    ],
)
def test_dapo_rows_that_do_not_fit(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^--input: .* line 1: row 0 is not dapo: {message}"):
        import_prompts("dapo", write_rows(tmp_path, [row]))


def test_deepscaler_and_big_math(tmp_path: Path) -> None:
    row = {"problem": "1+1?", "answer": "2", "solution": "", "source": "x"}
    assert import_prompts("deepscaler", write_rows(tmp_path, [row]))[0].answer == "2"
    rates = [0.25, None, float("nan")]
    rows = [row | {"domain": ["Mathematics -> Algebra"], "llama8b_solve_rate": rate} for rate in rates]
    source = write_rows(tmp_path, rows)
    assert [prompt.pass_rate for prompt in import_prompts("big_math", source)] == [0.25, None, None]
    with pytest.raises(ValueError, match="pass_rate must be a number from 0 to 1"):
        import_prompts("big_math", write_rows(tmp_path, [row | {"llama8b_solve_rate": 12}]))


def test_orz_rows_of_a_table_and_of_json_lines(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "1+1?"}, {"from": "assistant", "ground_truth": {"value": "2"}}]
    for row in (turns, {"0": turns[0], "1": turns[1]}):
        (prompt,) = import_prompts("orz", write_rows(tmp_path, [row]))
        assert (prompt.messages, prompt.answer) == ((Message("user", "1+1?"),), "2")


def import_fields(columns: Columns, source: str, skip_bad: int = 0) -> list[dict[str, Any]]:
    return import_rows(DataFormat(columns.to_row), "fields", open_source(source), skip_bad=skip_bad).items


def test_columns_may_be_nested(tmp_path: Path) -> None:
    row = {
        "chat": [{"role": "user", "content": "1+1?"}],
        "truth": {"values": ["2", "3"]},
        "a.b": "dotted",
        "rate": 0.5,
        "kind": ["sum"],
    }
    source = write_rows(tmp_path, [row])
    (found,) = import_fields(Columns("chat.0.content", "truth.values.1", "rate", "kind"), source)
    assert (found["prompt"][0]["content"], found["answer"], found["pass_rate"]) == ("1+1?", "3", 0.5)
    assert found["tags"] == ["sum"]
    assert import_fields(Columns("chat", "a.b"), source)[0]["answer"] == "dotted"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns("Question", "a"), "there is no column 'Question'; the columns found are q, a, n, l, o, z"),
        (Columns("q", "x.y"), "there is no column 'x.y'"),
        (Columns("q", "l"), "l holds a list; name what is in it, such as l.0"),
        (Columns("q", "o"), "o holds an object; name what is in it, such as o.value"),
        (Columns("q", "z"), "z is null; give a non-empty string"),
        (Columns("o", "a"), "o must be a string, not an object"),
        (Columns("q", "a", pass_rate="q"), "pass_rate must be a number from 0 to 1, or null, got '1\\+1\\?'"),
        (Columns("q", "a", tags="o"), "o must be a text or a list of texts"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, columns: Columns, message: str) -> None:
    row = {"q": "1+1?", "a": 2, "n": True, "l": ["2"], "o": {"value": "2"}, "z": None}
    with pytest.raises(ValueError, match=rf"^--input: .* line 1: row 0 is not fields: {message}"):
        import_fields(columns, write_rows(tmp_path, [row]))


def test_csv_holds_numbers_as_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\ufeffq,a,r\n1+1?,2,0.5\n2+2?,4,\n", encoding="utf-8")
    assert [row["pass_rate"] for row in import_fields(Columns("q", "a", "r"), str(path))] == [0.5, None]


def test_bad_rows_are_skipped_up_to_a_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"q": "1+1?", "a": "2"}\n'
    path.write_text(good + "{\n" + good + "\n" + '{"q": "?"}\n' + '{"q": "?", "a": "9^{9^{9^9}}"}\n[1]\n' + good)
    columns = Columns("q", "a")
    assert [row["id"] for row in import_fields(columns, str(path), skip_bad=4)] == ["rows-0", "rows-2", "rows-6"]
    with pytest.raises(ValueError, match=r"4 bad rows, more than --skip-bad 3: line 2, line 5, line 6, line 7; the"):
        import_fields(columns, str(path), skip_bad=3)
    with pytest.raises(
        ValueError, match=r"rows\.jsonl line 2 is not JSON \(.*; 4 rows are bad: line 2, line 5.*; --skip-bad 4 would"
    ):
        import_fields(columns, str(path))


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 bad rows, and there is no other: line 1"):
        import_fields(Columns("q", "a"), write_rows(tmp_path, [{"q": 1}]), skip_bad=9)


def test_many_bad_rows_are_named_in_one_short_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 12 and 988 more$"):
        import_fields(Columns("q", "a"), write_rows(tmp_path, [{"q": "?"}] * 1000))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [dapo_row(f"What is ${n}+1$?", str(n + 1), str(n)) for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows * 5), tmp_path / "dapo.parquet", row_group_size=4)
    prompts = import_prompts("dapo", str(tmp_path / "dapo.parquet"))
    assert [(prompt.id, prompt.answer) for prompt in prompts] == [("dapo-0", "1"), ("dapo-1", "2"), ("dapo-2", "3")]

    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"^--input: .*bad\.parquet is not a readable parquet file"):
        import_prompts("dapo", str(tmp_path / "bad.parquet"))
    parquet.write_table(pyarrow.table({"problem": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"^--input: .*none\.parquet has no row"):
        import_prompts("math", str(tmp_path / "none.parquet"))


def test_the_files_of_a_folder_have_ids_of_their_own(tmp_path: Path) -> None:
    for name in ("algebra", "geometry"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, [math_row("$\\boxed{5}$")], "train.jsonl")
    (tmp_path / "README.md").write_text("not a row")
    prompts = import_prompts("math", str(tmp_path))
    assert [prompt.id for prompt in prompts] == ["algebra-train-0", "geometry-train-0"]
    sources = [source for name in ("algebra", "geometry") for source in open_source(f"{tmp_path}/{name}/train.jsonl")]
    rows = import_rows(DataFormat(Columns("problem", "level").to_row), "fields", sources).items
    assert [row["id"] for row in rows] == ["train-0", "train.2-0"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^--input: .*empty holds no \.jsonl, \.json, \.csv, \.parquet file"):
        import_prompts("math", str(tmp_path / "empty"))


def test_what_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list([math_row("$\\boxed{5}$")] * 2)})
    saved.save_to_disk(tmp_path / "math")
    assert [prompt.id for prompt in import_prompts("math", str(tmp_path / "math"))] == ["math-train-0", "math-train-1"]
    with pytest.raises(ValueError, match=r"^--split: .* has no split 'test'; its splits are train"):
        import_prompts("math", str(tmp_path / "math"), "test")


def test_a_hub_data_set_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"^--input: nobody/nothing is no file here, and as a hub data set its split"):
        import_prompts("math", "nobody/nothing")
    for path in ("some/longer/path", "/nowhere", "./nowhere"):
        with pytest.raises(ValueError, match=f"^--input: {path} is not a file; give a file, a folder or the name of"):
            import_prompts("math", path)
