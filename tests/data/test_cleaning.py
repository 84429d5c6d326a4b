"""Duplicates, conflicts, contamination and lengths, on questions made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from megatron_oreal.commands import prepare_data
from megatron_oreal.data.cleaning import CleaningSettings, clean
from megatron_oreal.data.contamination import ContaminationIndex
from megatron_oreal.data.duplicates import Question, find_near, proposed_pairs, shingle_set
from megatron_oreal.data.prompts import read_prompts
from megatron_oreal.data.question_text import has_image, same_text_key, words
from tests.support.small_tokenizers import write_small_tokenizer

LONG = "A farmer has 12 cows and 7 sheep on a green field near the old mill. How many animals does the farmer have?"


def rows(*questions: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"id": f"q{number}", "prompt": [{"role": "user", "content": question}], "answer": answer}
        for number, (question, answer) in enumerate(questions)
    ]


def kept_ids(questions: list[dict[str, Any]], **settings: Any) -> list[str]:
    return [row["id"] for row in clean(questions, CleaningSettings(**settings))[0]]


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("Find $x$.", "Find  x .", True),
        ("Find \\(x\\)", "Find $x$", True),
        ("$\\dfrac{1}{2}$", "$\\frac{1}{2}$", True),
        ("$\\left( 1 \\right)$", "$(1)$", True),
        ("ｘ＝１", "x=1", True),
        ("求 x 的值", "求x的值", False),  # a space between letters may matter
        ("Find $x$.", "Find $y$.", False),
        ("the numbers 1 2", "the numbers 12", False),
        ("$x+1$", "$x-1$", False),
        ("Let $A$", "Let $a$", False),
    ],
)
def test_questions_are_the_same_whatever_their_look(first: str, second: str, is_same: bool) -> None:
    assert (same_text_key(first) == same_text_key(second)) == is_same


def test_words_keep_numbers_and_signs() -> None:
    assert words("He paid $1,234.50 for 2 cats, didn't he?") == [
        "he",
        "paid",
        "1234.50",
        "for",
        "2",
        "cats",
        "didn",
        "t",
        "he",
    ]
    assert words("$x^2-\\Delta$ 求解") == ["x", "^", "2", "-", "\\delta", "求", "解"]


def test_exact_duplicates_go_and_the_first_stays() -> None:
    questions = rows(("Find $x$.", "5"), ("Find  x.", "5.0"), ("Find $y$.", "5"), ("Find x.", "\\boxed{5}"))
    assert kept_ids(questions, duplicates="exact") == ["q0", "q2"]
    kept, findings = clean(questions, CleaningSettings())
    assert kept == questions and findings.exact == [("q1", "q0"), ("q3", "q0")]


def test_answers_are_compared_as_the_verifier_does() -> None:
    questions = rows(("Expand it.", "x^2+2x+1"), ("Expand it.", "(x+1)^2"))
    kept, findings = clean(questions, CleaningSettings(duplicates="exact"))
    assert [row["id"] for row in kept] == ["q0"] and not findings.conflicts


def test_a_question_with_two_answers_is_reported_and_goes() -> None:
    questions = rows(("Find $x$.", "5"), ("Find x.", "6"), ("Find x.", "5"), ("Find $y$.", "1"))
    kept, findings = clean(questions, CleaningSettings(duplicates="exact"))
    assert [row["id"] for row in kept] == ["q3"]
    assert [[each["answer"] for each in group] for group in findings.conflicts] == [["5", "6", "5"]]
    assert findings.num_conflicting == 3 and not findings.exact
    assert clean(questions, CleaningSettings())[0] == questions


def test_near_duplicates_have_the_same_numbers_and_answer() -> None:
    questions = rows(
        (LONG, "19"),
        (LONG.replace("the farmer have", "the farmer own"), "19"),  # one word
        (LONG.replace("12", "13"), "19"),  # another number
        (LONG.replace("animals", "legs"), "76"),  # another answer
        (LONG.upper(), "19"),
    )
    kept, findings = clean(questions, CleaningSettings(duplicates="near", near_threshold=0.7))
    assert [row["id"] for row in kept] == ["q0", "q2", "q3"]
    assert findings.near == [("q1", "q0"), ("q4", "q0")]
    assert findings.near_conflicts == [[{"id": "q0", "answer": "19"}, {"id": "q3", "answer": "76"}]]
    assert kept_ids(questions, duplicates="near", near_threshold=1.0) == ["q0", "q1", "q2", "q3"]


def test_one_of_a_chain_of_near_duplicates_stays() -> None:
    """The second is like the first and the third like the second alone: the first and the third stay."""
    texts = ["a b c d e f g h", "b c d e f g h i", "c d e f g h i j"]  # similarities 5/7, 5/7 and 4/8
    found = find_near([Question(t, t, "1") for t in texts], range(3), 0.6, lambda a, b: a == b)
    assert found.near == [(1, 0)]


def test_minhash_proposes_what_comparing_all_finds() -> None:
    texts = [f"the {n} th of many unlike texts on subject {n % 7} by author {n}".replace("0", "o") for n in range(40)]
    sets = {number: shingle_set(text.split()) for number, text in enumerate([*texts, *texts])}
    pairs = set(proposed_pairs(list(sets), sets, 0.8))
    assert {(number + 40, number) for number in range(40)} <= pairs


def test_a_shared_run_of_words_is_contamination() -> None:
    index = ContaminationIndex(ngram=5)
    index.add("Two trains leave Rome at 9 and meet in Pisa.", "long")
    index.add("What is $2+3$?", "short")
    assert index.find("Tomorrow two trains leave ROME around 9") is None  # four words
    assert index.find("Tomorrow two trains leave ROME at 9.") == "long"
    assert index.find("Compute: what is 2 + 3") == "short"  # five words and signs in a row
    assert index.find("What is $2-3$?") is None
    whole = ContaminationIndex(ngram=13)
    whole.add("Find $x$ if $x=1$.", "tiny")
    assert whole.find("find x if x = 1") == "tiny"
    assert whole.find("Find x if x=1 and y=2") is None
    assert whole.find("") is None


def test_images() -> None:
    for text in ("![a](b.png)", "<img src='x'>", "\\includegraphics{x}", "see https://x.org/a/b.JPG now"):
        assert has_image(text)
    assert not has_image("An image of $f$ is [0, 1](b). https://x.org/a")
    questions = rows(("![a](b.png) How long?", "1"), ("Find x.", "2"))
    assert kept_ids(questions) == ["q0", "q1"] and kept_ids(questions, drop_images=True) == ["q1"]


def test_long_questions_go(tmp_path: Path) -> None:
    questions = rows(("12345", "1"), ("1234", "2"), ("123", "3"))
    assert kept_ids(questions, max_characters=4) == ["q1", "q2"]
    write_small_tokenizer(tmp_path)
    assert kept_ids(questions, max_tokens=3, tokenizer=tmp_path) == ["q2"]
    with pytest.raises(ValueError, match=r"^--tokenizer: .* holds no tokenizer"):
        clean(questions, CleaningSettings(max_tokens=3, tokenizer=tmp_path / "none"))
    with pytest.raises(ValueError, match=r"^--max-tokens .* give --tokenizer DIR"):
        clean(questions, CleaningSettings(max_tokens=3))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(prepare_data.main, list(map(str, arguments)))


def test_the_command_says_what_it_left_out(tmp_path: Path) -> None:
    questions = [(LONG, "19"), (LONG, "19"), ("Find $x$.", "1"), ("Find x.", "2"), ("<img> What is it worth now?", "3")]
    lines = [json.dumps({"q": question, "a": {"value": answer}}) for question, answer in questions]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{"]))
    (tmp_path / "eval.jsonl").write_text(
        '{"id": "e", "prompt": "Is this <img> what is it worth now?", "answer": "3"}\n'
    )
    out, summary = tmp_path / "new" / "out.jsonl", tmp_path / "new" / "summary.json"
    command = ["fields", "--question", "q", "--answer", "a.value", "--input", tmp_path / "in.jsonl", "--out", out]
    done = run(
        *command, "--skip-bad", "1", "--decontaminate", tmp_path / "eval.jsonl", "--ngram", "6", "--summary", summary
    )
    assert done.exit_code == 0, done.output
    assert [prompt.id for prompt in read_prompts(out, "data.prompts")] == ["in-0"]
    found = json.loads(summary.read_text())
    counts = {key: value["count"] for key, value in found.items() if isinstance(value, dict)}
    assert counts == {
        "repeats": 0,
        "bad_rows": 1,
        "too_long": 0,
        "image_links": 1,
        "contaminated": 1,
        "exact_duplicates": 1,
        "near_duplicates": 0,
        "conflicting_answers": 2,
        "similar_with_other_answers": 0,
    }
    assert (found["rows"], found["written"]) == (6, 1)
    assert found["contaminated"]["sets"] == {"eval": 1}
    lines = done.output.splitlines()
    assert lines[0].split() == ["6", "rows", "of", str(tmp_path / "in.jsonl")]
    assert any("2 rows whose question has several answers: removed (the first: in-2: 1, in-3: 2)" in s for s in lines)
    assert lines[-1] == f"{out}: 1 prompts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--question", "q"], "--answer names the column of the answer: give it for fields"),
        (["--answer", "a", "--question", "q", "--ngram", "5"], "--ngram has an effect with --decontaminate alone"),
        (["--answer", "a", "--question", "q", "--tokenizer", "x"], "--tokenizer counts tokens for --max-tokens"),
        (
            ["--answer", "a", "--question", "q", "--duplicates", "exact", "--near-threshold", "0.5"],
            "--near-threshold has",
        ),
        (
            ["--answer", "a", "--question", "q", "--decontaminate", "none.jsonl"],
            "--decontaminate: none.jsonl does not exist",
        ),
        (["--answer", "a", "--question", "q", "--max-characters", "1"], "--out: nothing is left of 1 prompts"),
        (["--summary", "{folder}/out.jsonl"], "--summary: "),
        (["--out", "{folder}/in.jsonl"], "--out: "),
        (["--sft"], "--sft: fields holds answers without solutions"),
        (["--sft", "--drop-images"], "--drop-images works on prompts: drop it, or drop --sft"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"q": "1+1?", "a": "2"}\n')
    options = [option.format(folder=tmp_path) for option in options]
    done = run("fields", "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", *options)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert done.stderr.startswith(f"Error: {message}")
    assert not (tmp_path / "out.jsonl").exists()


def test_column_options_are_for_fields_alone(tmp_path: Path) -> None:
    done = run("oreal", "--input", "x.jsonl", "--out", tmp_path / "out.jsonl", "--question", "q")
    assert done.exit_code == 2 and done.stderr.startswith("Error: --question is for fields: drop it")


def test_questions_without_words_or_without_a_user_are_told_apart() -> None:
    assert kept_ids(rows(("!!!", "1"), ("???", "1")), duplicates="near") == ["q0", "q1"]
    systems = [
        {"id": text, "prompt": [{"role": "system", "content": text}], "answer": answer}
        for text, answer in (("a", "1"), ("b", "2"))
    ]
    assert kept_ids(systems, duplicates="near") == ["a", "b"]


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"question": "a \\ud800", "gold_answer": "1"}\n')
    done = run("oreal", "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.exit_code == 2 and "line 1: row 0 is not oreal: a text holds half of a surrogate pair" in done.stderr
