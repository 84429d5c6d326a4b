"""`megatron-oreal report`: what it reads of runs, what it computes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.config import AlarmsConfig
from megatron_oreal.observability.alarm_log import AlarmLog
from megatron_oreal.reports.run_report.charts import Chart, Series, bucket_width, histogram, over_seeds, thinned
from megatron_oreal.reports.run_report.command import write_report
from megatron_oreal.reports.run_report.experiments import Drawer, group_by_seed
from megatron_oreal.reports.run_report.rollouts import group_kind, spread
from megatron_oreal.reports.run_report.runs import read_reported_run, run_names
from megatron_oreal.reports.run_report.throughput import phase_seconds, update_flops, utilization
from tests.support.reported_runs import PHASES, write_training_run
from tests.support.viewed_runs import row, write_rows

UPLOT = {"uPlot.iife.min.js": "19c8d4c6ad88929a", "uPlot.min.css": "df630c6a8d6f8eea"}
HOSTILE = "</script><script>alert(1)</script><img src=x> {{charts}} \u202e"


def charts_of(page: Path) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page.read_text("ascii"))
    assert found is not None
    charts: list[dict[str, Any]] = json.loads(found[1])
    return charts


def chart(page: Path, title: str) -> dict[str, Any]:
    return next(one for one in charts_of(page) if one["title"] == title)


def test_a_report_shows_what_the_run_logged(tmp_path: Path) -> None:
    run = write_training_run(tmp_path / "run", 10)
    lines = write_report([run], tmp_path / "out.html")
    assert re.fullmatch(r".*out\.html: report of 1 run, 0\.\d MB", lines[-1])
    page, text = tmp_path / "out.html", (tmp_path / "out.html").read_text("ascii")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reward = chart(page, "Reward: share of correct samples")
    assert reward["x"] == list(range(10))
    assert reward["series"][0]["values"] == pytest.approx([one["reward/mean"] for one in logged[:-1]], rel=1e-4)
    held_out = chart(page, "Held-out accuracy: math")
    assert held_out["x"] == [0, 5, 10] and held_out["series"][0]["values"] == [0.2, 0.45, 0.75]
    stack = chart(page, "Seconds of a step")
    assert {one["label"]: one["values"][0] for one in stack["series"]} == {
        phase.replace("_", " "): seconds for phase, seconds in PHASES.items()
    }
    assert "best by eval/math/greedy" in text and "finished" in text and "math/greedy 0.75 at step 10" in text
    assert "NVIDIA H100" in text
    shown = {one["title"] for one in charts_of(page)}
    assert {"Share of correct samples by data set", "Share of correct samples by difficulty", "Verdicts"} <= shown
    assert "judge/set_0/agreed" in shown  # what has no chart of its own comes last
    assert [one["label"] for one in chart(page, "Share of correct samples by data set")["series"]] == ["gsm8k", "math"]
    lengths = chart(page, "Histogram of lengths: run")
    assert lengths["kind"] == "bars" and [one["label"] for one in lengths["series"]] == ["step 0", "step 4", "step 9"]
    assert all(sum(one["values"]) == pytest.approx(1.0, abs=1e-3) for one in lengths["series"])


def test_alarms_are_listed_and_marked(tmp_path: Path) -> None:
    runs = [write_training_run(tmp_path / name, 10, samples=False) for name in ("run", "other")]
    write_report(runs, tmp_path / "out.html")
    assert "<h2>Alarms" not in (tmp_path / "out.html").read_text("ascii")
    log = AlarmLog(runs[0], 0, AlarmsConfig(), lambda _line: None)
    for step in range(10):
        log.observe(step, {"policy/mismatch": 0.2 if step == 3 else 0.0, "rollout/length_limit_share": 0.5})
        log.observe(step, {"time/rollout_seconds": 100.0 if step == 8 else 3.0})
    write_report(runs[:1], tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text("ascii")
    listed = re.findall(
        r'<td>run</td><td class="number">(\d+)</td><td(?: class="number")?>([\w ]+)</td><td>([\w ()]+)</td>', text
    )
    assert listed == [
        ("3", "8", "mismatch"),
        ("4", "it lasts", "length_limit"),
        ("8", "it lasts", "slow_phase (rollout)"),
    ]
    assert "mismatch: engine and trainer disagree by 0.2 nats a token" in text
    page = tmp_path / "out.html"
    assert chart(page, "Mismatch: mean |difference of log-probs|")["marks"] == [{"x": 3, "label": "mismatch"}]
    assert chart(page, "Share of responses cut at the length limit")["marks"] == [{"x": 4, "label": "length_limit"}]
    assert chart(page, "Seconds of a step")["marks"] == [{"x": 8, "label": "slow_phase (rollout)"}]
    assert "marks" not in chart(page, "Reward: share of correct samples")
    write_report(runs, page)
    assert chart(page, "Mismatch: mean |difference of log-probs|")["marks"] == [{"x": 3, "label": "run: mismatch"}]


def test_seeds_become_one_curve_with_a_band(tmp_path: Path) -> None:
    runs = [write_training_run(tmp_path / f"run{seed}", 6, seed) for seed in range(3)]
    runs.append(write_training_run(tmp_path / "other", 6, 0, group_size=8))
    write_report(runs, tmp_path / "out.html")
    reward = chart(tmp_path / "out.html", "Reward: share of correct samples")
    assert [one["label"] for one in reward["series"]] == ["run0 (mean of 3 seeds: 0, 1, 2)", "other"]
    first = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["reward/mean"] for run in runs[:3]]
    band = reward["series"][0]
    assert band["values"][0] == pytest.approx(sum(first) / 3, rel=1e-4)
    assert (band["low"][0], band["high"][0]) == pytest.approx((min(first), max(first)), rel=1e-4)
    assert "low" not in reward["series"][1]
    text = (tmp_path / "out.html").read_text("ascii")
    differing = re.findall(
        r"<tr><td>([\w.]+)</td><td", text.partition("These settings differ")[2].partition("<details")[0]
    )
    assert differing == ["rollout.group_size", "seed"]


def test_the_layers_of_seeds_fill_their_stack(tmp_path: Path) -> None:
    """A verdict that one seed has and the other has not counts as none there: shares still add up to 1."""
    runs = [write_training_run(tmp_path / f"run{seed}", 6, seed) for seed in range(3)]
    write_rows(runs[0] / "rollouts" / "step_000002.jsonl", [row(status="timeout")])
    write_report(runs, tmp_path / "out.html")
    for title in ("Verdicts", "Groups by their own pass rate"):
        layers = [one["values"] for one in chart(tmp_path / "out.html", title)["series"]]
        assert [sum(values) for values in zip(*layers, strict=True)] == pytest.approx([1.0] * 6, abs=1e-3), title


def test_the_utilization_is_that_of_its_formula(tmp_path: Path) -> None:
    run = read_reported_run(write_training_run(tmp_path / "run", 3, samples=False), "run")
    # 6 x 1e9 parameters x 100 000 tokens in 1.5 s on 2 GPUs of 989 TFLOP/s
    assert update_flops(run)["TFLOP/s"][0] == pytest.approx(200.0)
    assert utilization(run)["MFU"][0] == pytest.approx(200 / 989)
    run.starts[-1]["gpu"] = "a card of another maker"
    assert utilization(run) == {}
    run.starts.clear()
    assert update_flops(run)["TFLOP/s"] == {}
    assert set(phase_seconds(run)) == {phase.replace("_", " ") for phase in PHASES}


def test_recorded_token_weights_become_a_histogram(tmp_path: Path) -> None:
    run = write_training_run(tmp_path / "run", 3)
    (run / "rollout_tokens").mkdir()
    write_rows(run / "rollout_tokens" / "step_000001.jsonl", [{"weights": [0.0, 3.0]}, {"weights": [3.0, None, 3.0]}])
    write_report([run], tmp_path / "out.html")
    (series,) = chart(tmp_path / "out.html", "Histogram of token weights: run")["series"]
    assert [value for value in series["values"] if value] == [0.25, 0.75] and series["label"] == "step 1"


def test_a_run_that_goes_on_is_read_up_to_its_torn_line(tmp_path: Path) -> None:
    run = write_training_run(tmp_path / "run", 10)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    last = run / "rollouts" / "step_000009.jsonl"
    last.write_text(last.read_text()[:-30])
    damaged = run / "rollouts" / "step_000003.jsonl"
    damaged.write_text("no row\n" + damaged.read_text())
    (run / "environment.jsonl").write_text("[1]\n{torn")
    (run / "checkpoints" / "step_000010" / "run.json").unlink()
    notes = write_report([run], tmp_path / "out.html")
    assert "at step 3 of 10" in (tmp_path / "out.html").read_text("ascii")
    assert any("the last line is torn" in note for note in notes) and any("line 1 cannot be read" in n for n in notes)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    run = write_training_run(tmp_path / "a<script>x", 4)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_rows(run / "metrics.jsonl", [one | {f"eval/{HOSTILE}/greedy": 0.5} for one in records])
    write_report([run], tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text("ascii")
    assert "<script>alert" not in text and "a<script>x" not in text and text.count("<script") == 3
    assert any(HOSTILE in one["title"] for one in charts_of(tmp_path / "out.html"))


def test_what_is_no_run_is_refused_with_one_line(tmp_path: Path) -> None:
    run = write_training_run(tmp_path / "run", 3, samples=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "config.yaml").write_text("run_dir: here\n")
    fresh = write_training_run(tmp_path / "fresh", 3)
    (fresh / "metrics.jsonl").write_text("")
    out = tmp_path / "out.html"
    for runs, message in (
        ([tmp_path / "none"], "does not exist"),
        ([run / "config.yaml"], "is a file"),
        ([empty], "has no config.yaml"),
        ([evaluation], "has no metrics.jsonl"),
        ([fresh], "has not finished a step yet"),
        ([run, run / ".." / "run"], "given twice"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            write_report(runs, out)
        assert "\n" not in str(caught.value)
    for name in ("out.txt", "none/out.html"):
        with pytest.raises(ValueError, match="--out"):
            write_report([run], tmp_path / name)
    assert not out.exists()


def test_long_runs_are_drawn_as_means() -> None:
    assert (bucket_width([1999]), bucket_width([2000]), bucket_width([5000, 10]), bucket_width([])) == (1, 2, 3, 1)
    assert thinned({0: 1.0, 1: 3.0, 2: 5.0, 3: 6.0}, 2) == {0: 2.0, 2: 5.5}
    assert thinned({7: 1.0}, 1) == {7: 1.0}


def test_bands_leave_out_what_is_not_finite() -> None:
    series = over_seeds("a", [{0: 1.0, 1: math.nan}, {0: 3.0, 2: 4.0}])
    assert series is not None
    assert series.values == {0: 2.0, 2: 4.0} and series.low == {0: 1.0, 2: 4.0} and series.high == {0: 3.0, 2: 4.0}
    assert over_seeds("a", [{0: math.inf}]) is None


def test_a_chart_has_one_axis_for_all_curves() -> None:
    drawn = Chart("t", [Series("a", {0: 1.23456789, 2: 1e-9}), Series("b", {1: 5.0})]).as_json()
    assert drawn["x"] == [0, 1, 2]
    assert [one["values"] for one in drawn["series"]] == [[1.2346, None, 1e-9], [None, 5, None]]  # type: ignore[attr-defined]


def test_histograms_are_shares() -> None:
    assert histogram("h", [0.0, 1.0, 1.0, 2.0], 0.0, 2.0, 2).values == {0.5: 0.25, 1.5: 0.75}
    assert sum(histogram("h", [3.0, 3.0], 3.0, 3.0, 4).values.values()) == 1.0


def test_names_tell_runs_apart() -> None:
    assert run_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert run_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert [group_kind(rate) for rate in (0.0, 0.25, 0.3, 1.0)] == [
        "none correct",
        "up to a quarter",
        "up to half",
        "all correct",
    ]
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread([1, 2], 4) == [1, 2]


def test_a_run_without_samples_has_the_other_sections(tmp_path: Path) -> None:
    runs = [read_reported_run(write_training_run(tmp_path / "run", 3, samples=False), "run")]
    drawer = Drawer.of(group_by_seed(runs))
    assert drawer.layers("x", lambda run: run.rollouts.by_source) is None
    assert drawer.metrics("x", [("no/such", "a")]) is None


def test_uplot_is_the_published_file() -> None:
    """SHA-256 of dist/uPlot.iife.min.js and dist/uPlot.min.css of uplot 1.6.32 in npm's registry."""
    page = Path(write_report.__code__.co_filename).parent / "page"
    digests = {name: hashlib.sha256((page / name).read_bytes()).hexdigest()[:16] for name in UPLOT}
    assert digests == UPLOT
