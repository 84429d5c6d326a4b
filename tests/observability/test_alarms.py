"""Alarms: each fires on its cause, is told once while it lasts, and a resumed run goes on as an unbroken one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.config import AlarmsConfig, MachineAlarms
from megatron_oreal.observability.alarm_log import FILE, AlarmLog, read_alarms
from megatron_oreal.observability.alarms import Alarms
from megatron_oreal.observability.memory import memory_of_process
from megatron_oreal.types import Metrics
from tests.support.metric_names import is_documented
from tests.support.paths import ROOT

SHORT = AlarmsConfig(window_steps=2)


def told(history: list[Metrics], config: MachineAlarms = SHORT) -> list[tuple[int, str, str]]:
    """The events over records that are numbered from 0: (step, alarm with its subject, fired or ended)."""
    alarms = Alarms(config)
    events = [event for step, record in enumerate(history) for event in alarms.observe({"step": step} | record)]
    for event in events:
        assert event.line.startswith(f"step {event.step}: alarm {event.alarm}") and "\n" not in event.line
        assert is_documented(event.metric)
    return [(event.step, f"{event.alarm} {event.subject}".strip(), event.event) for event in events]


def series(metric: str, *values: float) -> list[Metrics]:
    return [{metric: value} for value in values]


def groups(mixed: int, correct: int, incorrect: int) -> Metrics:
    names = ("mixed", "all_correct", "all_incorrect")
    return {f"reward/groups_{name}": n for name, n in zip(names, (mixed, correct, incorrect), strict=True)}


@pytest.mark.parametrize(
    ("alarm", "bad", "good"),
    [
        ("groups_solved", groups(1, 9, 0), groups(2, 8, 0)),
        ("groups_unsolved", groups(0, 1, 9), groups(0, 2, 8)),
        ("length_limit", {"rollout/length_limit_share": 0.2}, {"rollout/length_limit_share": 0.19}),
        ("staleness", {"rollout/staleness_mean": 4.0}, {"rollout/staleness_mean": 3.9}),
        (
            "verifier_timeouts",
            {"rollout/num_samples": 100, "verifier/timeout": 1, "verifier/crash": 1},
            {"rollout/num_samples": 100, "verifier/timeout": 1, "verifier/crash": 0},
        ),
    ],
)
def test_alarms_about_samples_ring_over_a_window(alarm: str, bad: Metrics, good: Metrics) -> None:
    assert told([bad]) == []
    assert told([good, bad, good]) == [], "one step does not ring"
    history = [good, bad, bad, bad, bad, good, good, good, bad, bad]
    assert told(history) == [(2, alarm, "fired"), (6, alarm, "ended"), (9, alarm, "fired")]
    assert told(history, SHORT.model_copy(update={alarm: None})) == [], "null switches it off"
    assert told(history, MachineAlarms()) == [], "sft has no samples"


def test_the_mismatch_rings_in_any_step() -> None:
    history = series("policy/mismatch", 0.01, 0.1, 0.01, 0.2, 0.01, 0.01, 0.01)
    assert told(history) == [(1, "mismatch", "fired"), (5, "mismatch", "ended")]


def test_steps_without_the_metric_count_neither_way() -> None:
    history: list[Metrics] = [{"policy/mismatch": 1.0}, {}, {}, {}, {"policy/mismatch": 1.0}]
    assert told(history) == [(0, "mismatch", "fired")]
    assert told(series("policy/mismatch", float("nan"), float("inf"))) == []
    assert told([groups(0, 0, 0)] * 9) == []


def test_entropy_is_compared_with_its_beginning() -> None:
    fall = [2.0, 2.0, *[0.3] * 3, *[0.19] * 3]
    assert told(series("policy/entropy", *fall)) == [(6, "entropy_share", "fired")]
    assert told(series("policy/entropy", *[0.01] * 9)) == [], "it was low from the start"


def test_a_phase_is_slow_against_its_own_history() -> None:
    slow = told(series("time/rollout_seconds", *[20.0] * 6, 61.0, *[20.0] * 5))
    assert slow == [(6, "slow_phase rollout", "fired"), (11, "slow_phase rollout", "ended")]
    assert told(series("time/update_seconds", *[1.0] * 6, 10.9)) == [], "ten seconds more are needed"
    assert told(series("time/update_seconds", *[1.0] * 4, 100.0)) == [], "four steps are no history"
    lasting = told(series("time/update_seconds", *[10.0] * 10, *[40.0] * 60))
    assert lasting == [(10, "slow_phase update", "fired"), (24, "slow_phase update", "ended")], "the new normal"


def test_memory_that_grows_rings_and_memory_that_levels_off_does_not() -> None:
    leak = [1.0 + 0.1 * step for step in range(60)]
    # The largest of the first ten (steps 2 to 11) is 2.1: the smallest of ten steps is above 1.5 x 2.1 from step 31 on.
    assert told(series("time/memory/host_gib", *leak)) == [(31, "memory_growth host", "fired")]
    assert told(series("time/memory/gpu_gib", *[1.0] * 12, *[1.49] * 60)) == []
    assert told(series("time/memory/gpu_gib", *[1.0] * 20, *[9.0] * 9, *[1.0] * 20)) == [], "an evaluation's peak"


def random_history(seed: int, num_steps: int) -> list[Metrics]:
    rng = random.Random(seed)
    history: list[Metrics] = []
    for step in range(num_steps):
        record: Metrics = groups(rng.randrange(3), rng.randrange(20), rng.randrange(20))
        record |= {"step": step, "rollout/length_limit_share": 0.3 * rng.random(), "rollout/num_samples": 100}
        record |= {"verifier/timeout": rng.randrange(5), "verifier/crash": 0}
        record |= {"rollout/staleness_mean": 8 * rng.random(), "policy/entropy": rng.random() ** 6}
        record["time/rollout_seconds"] = rng.choice([20.0, 21.0, 22.0, 90.0])
        if rng.random() < 0.7:
            record["policy/mismatch"] = 0.12 * rng.random()
        history.append(record)
    return history


def write_metrics(run_dir: Path, history: list[Metrics]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))


@pytest.mark.parametrize("seed", range(3))
def test_a_resumed_run_tells_what_an_unbroken_one_does(tmp_path: Path, seed: int) -> None:
    history, lines = random_history(seed, 60), []
    for number, start in enumerate([60, *range(3, 60, 9)]):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        last = min(60, start + 4)  # The run is killed four steps after its last checkpoint, at `start`.
        write_metrics(run_dir, [])
        log = AlarmLog(run_dir, 0, SHORT, lambda _line: None)
        for record in history[:last]:
            log.observe(int(record["step"]), record)
        write_metrics(run_dir, history[:start])  # MetricsLog drops the records that come again
        again = AlarmLog(run_dir, start, SHORT, lambda _line: None)
        for record in history[start:]:
            again.observe(int(record["step"]), record)
        lines.append((run_dir / FILE).read_text())
    assert len(lines[0].splitlines()) > 20 and len(set(lines)) == 1


def test_a_resume_names_the_alarms_that_last(tmp_path: Path) -> None:
    history = series("policy/mismatch", 1.0, 1.0)
    write_metrics(tmp_path, [])
    notes: list[str] = []
    log = AlarmLog(tmp_path, 0, SHORT, notes.append)
    for step, record in enumerate(history):
        log.observe(step, record)
    assert len(notes) == 1 and notes[0].startswith("step 0: alarm mismatch: engine and trainer disagree by 1 nats")
    write_metrics(tmp_path, [{"step": step} | record for step, record in enumerate(history)])
    again = AlarmLog(tmp_path, 2, SHORT, notes.append)
    again.observe(2, {"policy/mismatch": 1.0})
    assert notes[1:] == ["alarms that last since before step 2: mismatch"]


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    (event,) = Alarms(SHORT).observe({"step": 0, "policy/mismatch": 1.0})
    log = AlarmLog(tmp_path, 0, SHORT, lambda _line: None)
    log.observe(0, {"policy/mismatch": 1.0})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 1}\n[]\n{"st')
    assert read_alarms(tmp_path) == [event]


def test_each_alarm_has_a_paragraph_and_a_setting() -> None:
    headings = [line[3:] for line in (ROOT / "docs/alarms.md").read_text().splitlines() if line.startswith("## ")]
    names = {alarm.name for alarm in Alarms(AlarmsConfig()).alarms}
    assert set(headings) == names and len(headings) == len(names)
    assert names <= set(AlarmsConfig.model_fields)
    assert names == {*AlarmsConfig.model_fields} - {"window_steps", "slow_phase_seconds"}


def test_this_process_has_memory() -> None:
    found: dict[str, Any] = memory_of_process()
    assert 0.01 < found["time/memory/host_gib"] < 1000 and "time/memory/gpu_gib" not in found
