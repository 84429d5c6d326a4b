"""What `megatron-oreal view` reads, chooses, prints and writes, by hand; tests/browser opens the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_oreal.cli import cli
from megatron_oreal.launch import is_ours
from megatron_oreal.reports.viewer.command import keep_what_fits
from megatron_oreal.reports.viewer.page import write_page
from megatron_oreal.reports.viewer.samples import UNDECIDED, ViewedRun, opinion_of, read_run
from megatron_oreal.reports.viewer.selection import Bounds, Filters, in_order, parse_bounds
from megatron_oreal.reports.viewer.table import printable, samples_table, shortened
from megatron_oreal.types import UNJUDGED
from tests.support.paths import ROOT
from tests.support.viewed_runs import row, write_rows, write_run


def make_run(folder: Path, *rows: dict[str, object], step: int = 0) -> Path:
    write_rows(folder / "rollouts" / f"step_{step:06d}.jsonl", rows)
    return folder


def embedded(page: Path, name: str = "samples") -> dict[str, object]:
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text())
    assert match
    found: dict[str, object] = json.loads(match[1])
    return found


def test_groups_and_pass_rates_by_hand(tmp_path: Path) -> None:
    """Two groups of one prompt are told apart by their number, and what could not be decided counts nowhere."""
    rows = [row(group=0), row(group=0, status="incorrect"), row(group=0, status="timeout"), row(group=1)]
    make_run(tmp_path, *rows)
    make_run(tmp_path, row(group=0, status="crash"), step=10)
    samples = read_run(tmp_path).samples
    assert [(sample.step, sample.row, sample.pass_rate) for sample in samples] == [
        (0, 0, 0.5), (0, 1, 0.5), (0, 2, 0.5), (0, 3, 1.0), (10, 0, None),
    ]  # fmt: skip
    assert samples[0].group == samples[2].group != samples[3].group != samples[4].group


def test_rows_of_another_version_are_read(tmp_path: Path) -> None:
    make_run(
        tmp_path,
        {"prompt_id": "a", "response": "x", "status": None, "reward": None, "later": [1]},
        {"prompt_id": 7, "response": None, "reward": "high", "num_tokens": 1e400, "extracted": 2},
        {"prompt_id": "a", "reward": 10**400, "logprob": float("nan"), "policy_version": True},
        {},
    )
    old, odd, huge, empty = read_run(tmp_path).samples
    assert (old.status, old.reward, old.source, old.judge, old.is_decided) == ("", None, "", None, False)
    assert (odd.prompt_id, odd.response, odd.reward, odd.num_tokens, odd.extracted) == ("7", "", None, None, "2")
    assert (huge.reward, huge.logprob, huge.policy_version) == (None, None, None)
    assert empty.prompt_id == ""
    write_page(tmp_path / "page.html", read_run(tmp_path))
    assert embedded(tmp_path / "page.html")["worst"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("said", "opinion"),
    [
        ("correct", "correct"), ("Incorrect", "incorrect"), (True, "correct"), (False, "incorrect"), (1.0, "correct"),
        (0, "incorrect"), ({"status": "correct", "reward": 0.0}, "correct"), ({"is_correct": False}, "incorrect"),
        ({"verdict": {"status": "timeout"}}, "timeout"), (None, None), ("", None), ({}, None), ([1], None),
    ],
)  # fmt: skip
def test_opinions_have_many_forms(said: object, opinion: str | None) -> None:
    assert opinion_of(said) == opinion


def test_judge_and_rules_disagree_only_where_both_decided(tmp_path: Path) -> None:
    make_run(
        tmp_path,
        row(status="incorrect", judge={"status": "correct"}),
        row(status="correct", rules="no_answer", judge="correct"),  # The judge overruled the rules.
        row(status="correct", judge=True),
        row(status="timeout", judge="correct"),
        row(status="incorrect", judge="timeout"),
        row(status="incorrect"),
    )
    disagreeing = [sample.judge_disagrees for sample in read_run(tmp_path).samples]
    assert disagreeing == [True, True, False, False, False, False]


def test_statuses_without_a_decision_are_those_of_the_verifier() -> None:
    assert set(UNDECIDED) == set(UNJUDGED)


def test_worst_first_by_hand(tmp_path: Path) -> None:
    make_run(
        tmp_path,
        row(group=0, response="right"),
        row(group=0, response="wrong where others are right", status="incorrect", reward=0.0),
        row(group=0, response="undecided", status="timeout", reward=0.0),
        row(group=1, prompt_id="b", response="wrong as all, short", status="incorrect", reward=0.0),
        row(group=1, prompt_id="b", response="wrong as all, long", status="incorrect", reward=0.0, num_tokens=9),
        row(group=2, prompt_id="c", response="disputed", judge="incorrect"),
        row(group=3, prompt_id="d", response="below zero", status="incorrect", reward=-1.0),
    )
    assert [sample.response for sample in in_order(read_run(tmp_path).samples, "worst")] == [
        "disputed", "undecided", "below zero", "wrong where others are right", "wrong as all, long",
        "wrong as all, short", "right",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("3", Bounds(3, 3)),
        ("3:", Bounds(low=3)),
        (":5", Bounds(high=5)),
        ("-1:0.5", Bounds(-1, 0.5)),
        (" 2 : 2 ", Bounds(2, 2)),
    ],
)
def test_intervals(text: str, bounds: Bounds) -> None:
    assert parse_bounds(text, "--steps") == bounds


@pytest.mark.parametrize("text", ["a", "5:3", ":", " ", "1:2:3", "nan", "nan:", ":nan", "1-2"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--steps: .* is no interval"):
        parse_bounds(text, "--steps")


def test_filters_by_hand(tmp_path: Path) -> None:
    rows = [row(reward=0.25, num_tokens=10), row(reward=None, num_tokens=None, source="dapo", response="An ELLIPSE.")]
    first, second = read_run(make_run(tmp_path, *rows)).samples
    for filters, expected in [
        (Filters(), (True, True)),
        (Filters(rewards=Bounds(0.25, 0.25)), (True, False)),
        (Filters(rewards=Bounds(high=9)), (True, False)),  # What is not known lies in no interval.
        (Filters(tokens=Bounds(low=11)), (False, False)),
        (Filters(sources=("dapo", "other")), (False, True)),
        (Filters(search="ellipse"), (False, True)),
        (Filters(search="p0", statuses=("correct",)), (True, True)),
        (Filters(disagreements=True), (False, False)),
    ]:
        assert (filters.hold(first), filters.hold(second)) == expected, filters


def test_a_torn_last_line_is_left_out_and_named(tmp_path: Path) -> None:
    file = make_run(tmp_path, row(), row()) / "rollouts/step_000000.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    run = read_run(tmp_path)
    assert len(run.samples) == 1
    assert run.notes == ["rollouts/step_000000.jsonl: the last line is torn, so its sample is left out"]


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_a_damaged_line_before_the_last_is_named(tmp_path: Path, damage: bytes) -> None:
    file = make_run(tmp_path, row()) / "rollouts/step_000000.jsonl"
    file.write_bytes(damage + b"\n" + file.read_bytes())
    with pytest.raises(ValueError, match=r"step_000000\.jsonl line 1 cannot be read .*: delete the line"):
        read_run(tmp_path)


def test_tokens_come_with_their_sample_and_misfits_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, row(), row())
    fitting = {"row": 1, "texts": ["a", "b"], "differences": [0.5, None], "advantages": [1.0]}
    misfits: list[dict[str, object]] = [
        {"row": 9, "texts": []}, {"row": "1", "texts": []}, {"row": 0, "texts": "ab"},
        {"row": 0, "texts": ["a"], "weights": [1.0, 2.0]}, {"row": 0}, {"row": 0, "texts": ["a"], "weights": 3},
        {"row": 0, "texts": ["a"], "advantages": []},
    ]  # fmt: skip
    write_rows(tmp_path / "rollout_tokens/step_000000.jsonl", [*misfits, fitting])
    run = read_run(tmp_path)
    assert [sample.tokens is not None for sample in run.samples] == [False, True]
    assert run.samples[1].difference == 0.5 and len(run.notes) == len(misfits)
    write_page(tmp_path / "page.html", run)
    assert embedded(tmp_path / "page.html", "tokens-0") == {"1": {name: fitting[name] for name in list(fitting)[1:]}}


def test_the_newest_samples_are_kept(tmp_path: Path) -> None:
    for step in range(4):
        make_run(tmp_path, row(), row(), step=step)
    run = read_run(tmp_path, limit=3)
    assert [(sample.step, sample.row) for sample in run.samples] == [(2, 1), (3, 0), (3, 1)]
    assert run.notes == ["only the newest 3 samples are shown: --limit N shows more"]
    assert read_run(tmp_path, limit=8).notes == []


def test_a_page_holds_what_a_browser_opens(tmp_path: Path) -> None:
    """Each sample has 20 characters: prompt 14, answer 1, response 5; each record two tokens."""
    make_run(tmp_path, *(row(response="12345") for _ in range(4)))
    write_rows(tmp_path / "rollout_tokens/step_000000.jsonl", [{"row": n, "texts": ["a", "b"]} for n in range(4)])
    run = read_run(tmp_path)
    keep_what_fits(run, 80, 8)
    assert len(run.samples) == 4 and not run.notes
    keep_what_fits(run, 79, 5)
    assert [sample.row for sample in run.samples] == [1, 2, 3]
    assert [sample.tokens is not None for sample in run.samples] == [False, True, True]
    assert [note.split(" fit")[0] for note in run.notes] == [
        "only the newest 3 samples", "only the tokens of the newest 2 samples",
    ]  # fmt: skip


def test_nothing_on_the_page_ends_its_element(tmp_path: Path) -> None:
    hostile = "</script><!--<script>\ud800\u2028\x00{{script}}"
    write_page(tmp_path / "page.html", read_run(make_run(tmp_path / "<i>", row(response=hostile, prompt=hostile))))
    text = (tmp_path / "page.html").read_bytes().decode("ascii")
    assert text.count("<script") == text.count("</script>") == 2 and "<!--" not in text
    data = embedded(tmp_path / "page.html")
    assert data["columns"]["response"] == [hostile] and data["prompts"] == [["p0", hostile, "2"]]  # type: ignore[index]
    assert "<title>Samples of &lt;i&gt;</title>" in text
    assert "http" not in re.sub(r'http-equiv|"http[^"]*w3\.org[^"]*"', "", text)


def test_the_page_names_its_only_script(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", read_run(make_run(tmp_path, row())))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', (tmp_path / "page.html").read_text())
    assert policy and "unsafe" not in policy[1] and policy[1].count("sha256-") == 2


def test_a_terminal_gets_nothing_to_obey() -> None:
    assert printable("a\x1b[31m\x07\u202e\ud800\n\u5b57") == "a\\x1b[31m\\x07\\u202e\\ud800\n\u5b57"
    assert (
        shortened("one two\nthree", 9) == "one tw..." and shortened("one two\nthree", 9, keeps_end=True) == "... three"
    )
    assert shortened("abc", 3) == "abc"


def test_the_table_leaves_out_what_nobody_knows(tmp_path: Path) -> None:
    samples = read_run(make_run(tmp_path, row(source="", logprob=None, response="x\x1b" * 500))).samples
    table = samples_table(samples, 100)
    assert table.splitlines()[0].split() == [
        "step", "row", "status", "reward", "pass", "rate", "tokens", "answer", "found", "prompt", "response",
    ]  # fmt: skip
    assert max(map(len, table.splitlines())) <= 100 and "\x1b" not in table


def view(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, ["view", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, 4, 3, response_tokens=20, recorded_groups=1)
    code, out, err = view(run, "--steps", "1", "--status", "correct", "--limit", "4", "--sort", "longest")
    lines = out.splitlines()[2:]
    assert code == 0 and len(lines) == 4 and all(line.split()[0] == "1" for line in lines)
    assert re.search(r"4 of \d+ samples that fit", err)
    code, out, _ = view(run, "--full", "--limit", "1")
    assert code == 0 and "\\boxed{" in out
    code, out, _ = view(run, "--out", tmp_path / "page.html", "--source", "gsm8k")
    assert code == 0 and set(embedded(tmp_path / "page.html")["columns"]["source"]) == {"gsm8k"}  # type: ignore[index]
    assert view(run, "--search", "no such text")[:2] == (0, "\n")
    assert "none of these steps has samples: there are steps 0 to 1" in view(run, "--steps", "7:")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "x"], "--steps: 'x' is no interval"),
        (["--status", "corect"], "--status: no sample has 'corect'; there are 'correct'"),
        (["--source", "x"], "--source: no sample has 'x'; there are 'math'"),
        (["--sort", "best"], "--sort: 'best' is no order; give one of worst, run, newest"),
        (["--out", "page.txt"], "page.txt does not end in .html"),
        (["--out", "missing/page.html"], "the folder missing does not exist"),
        (["--out", "page.html", "--full"], "--sort and --full are for the terminal"),
    ],
)
def test_mistakes_name_the_option(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert_refused(make_run(tmp_path, row()), arguments, message)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "started").mkdir()
    (tmp_path / "started/config.yaml").write_text("")
    for name, message in [
        ("missing", "does not exist"),
        ("file", "is a file"),
        (".", "is not a run's"),
        ("started", "has no samples yet"),
    ]:
        assert_refused(tmp_path / name, [], message)


def assert_refused(run: Path, arguments: list[str], message: str) -> None:
    error = CliRunner().invoke(cli, ["view", str(run), *arguments]).exception
    assert isinstance(error, ValueError) and is_ours(error) and message in str(error) and "\n" not in str(error)


def test_a_mistake_ends_with_one_line_and_without_torch(tmp_path: Path) -> None:
    script = "import sys; from megatron_oreal.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    run = str(make_run(tmp_path, row()))
    for arguments, code in [([run], 0), ([f"{run}/missing"], 2), ([run, "--limit=0"], 2)]:
        done = subprocess.run(
            [sys.executable, "-c", script, "view", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_run_that_goes_on_is_viewed(tmp_path: Path) -> None:
    """The run's temporary files are no samples."""
    make_run(tmp_path, row())
    (tmp_path / "rollouts/.step_000001.jsonl.1.ab.tmp").write_text("{")
    assert len(read_run(tmp_path).samples) == 1


def test_an_empty_run_makes_a_page(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", ViewedRun("a", [], [], set(), set()))
    assert embedded(tmp_path / "page.html")["columns"] == {}
