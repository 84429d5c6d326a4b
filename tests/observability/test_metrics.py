import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_oreal.observability.metrics import MetricsLog, PhaseTimer, metrics_path, read_metrics


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> None:
        self.seconds += seconds


def test_phases_and_the_rest_sum_to_the_step() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    for rollout_seconds in (3.0, 4.0):
        with timer("rollout"):
            clock.wait(rollout_seconds)
        clock.wait(0.5)
    with timer("update"):
        clock.wait(2.0)
    assert timer.flush() == {
        "time/rollout_seconds": 7.0,
        "time/update_seconds": 2.0,
        "time/other_seconds": 1.0,
        "time/step_seconds": 10.0,
    }


def test_the_next_step_starts_at_the_flush() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with timer("rollout"):
        clock.wait(3.0)
    timer.flush()
    clock.wait(0.25)
    assert timer.flush() == {"time/other_seconds": 0.25, "time/step_seconds": 0.25}


def test_real_seconds_sum_to_the_step() -> None:
    timer = PhaseTimer()
    with timer("update"):
        torch.randn(100, 100).sum()
    seconds = timer.flush()
    total = seconds.pop("time/step_seconds")
    assert sum(seconds.values()) == pytest.approx(total)
    assert 0 < seconds["time/update_seconds"] <= total


def test_a_phase_that_raises_is_counted_and_ended() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(RuntimeError), timer("update"):
        clock.wait(1.0)
        raise RuntimeError
    with timer("rollout"):
        clock.wait(2.0)
    seconds = timer.flush()
    assert (seconds["time/update_seconds"], seconds["time/rollout_seconds"]) == (1.0, 2.0)


def test_pending_work_is_paid_by_the_phase_that_started_it() -> None:
    clock, pending = Clock(), [0.0]

    def synchronize() -> None:
        clock.wait(pending.pop() if pending else 0.0)

    timer = PhaseTimer(synchronize, clock)
    with timer("update"):
        pending.append(5.0)  # a kernel that the device still works on
    with timer("rollout"):
        clock.wait(1.0)
    seconds = timer.flush()
    assert (seconds["time/update_seconds"], seconds["time/rollout_seconds"]) == (5.0, 1.0)


def test_phases_do_not_nest() -> None:
    timer = PhaseTimer()
    with timer("rollout"), pytest.raises(AssertionError, match="'update' begins inside 'rollout'"), timer("update"):
        pass


def test_each_step_is_one_line_that_is_there_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", start_step=0) as log:
        log.log(0, {"loss": torch.tensor(0.5), "num_tokens": 7})
        assert metrics_path(tmp_path / "run").read_text() == '{"step": 0, "loss": 0.5, "num_tokens": 7}\n'
        log.log(2, {"loss": 0.25})
    assert read_metrics(tmp_path / "run") == [{"step": 0, "loss": 0.5, "num_tokens": 7}, {"step": 2, "loss": 0.25}]


def test_what_is_not_finite_is_written_as_text(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, start_step=0) as log:
        log.log(0, {"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf)})
    assert metrics_path(tmp_path).read_text() == '{"step": 0, "a": "nan", "b": "inf", "c": "-inf"}\n'
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_a_resumed_run_drops_the_records_from_its_start_step_on(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, start_step=0) as log:
        for step in range(5):
            log.log(step, {"loss": float(step), "extra": math.nan})
    with MetricsLog(tmp_path, start_step=3) as log:
        assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2]
        log.log(3, {"loss": 30.0})
        log.log(4, {"loss": 40.0})
    records = read_metrics(tmp_path)
    assert [(record["step"], record["loss"]) for record in records] == [(0, 0), (1, 1), (2, 2), (3, 30), (4, 40)]
    assert math.isnan(records[0]["extra"])

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 2), (3, 30), (4, 40)]


def tear(text: str) -> str:
    return text[:-5]


def cut_the_newline(text: str) -> str:
    return text[:-1]


@pytest.mark.parametrize(("damage", "steps"), [(tear, [0, 1]), (cut_the_newline, [0, 1, 2])])
def test_a_torn_last_line_is_left_out(tmp_path: Path, damage: Callable[[str], str], steps: list[int]) -> None:
    with MetricsLog(tmp_path, start_step=0) as log:
        for step in range(3):
            log.log(step, {"loss": 0.5})
    path = metrics_path(tmp_path)
    path.write_text(damage(path.read_text()))
    assert [record["step"] for record in read_metrics(tmp_path)] == steps
    with MetricsLog(tmp_path, start_step=len(steps)) as log:
        log.log(len(steps), {"loss": 0.25})
    assert [record["step"] for record in read_metrics(tmp_path)] == [*steps, len(steps)]


@pytest.mark.parametrize(
    "line", ['{"step": 0, "lo', "[1]", '{"loss": 1}', '{"step": 0, "a": "b"}', '{"step": 0, "a": []}']
)
def test_damage_before_the_last_line_is_named(tmp_path: Path, line: str) -> None:
    metrics_path(tmp_path).write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not a metrics record \(.*\): delete the line$"):
        read_metrics(tmp_path)


def test_a_run_without_records_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_steps_rise(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, start_step=5) as log:
        with pytest.raises(AssertionError, match="step 4 is logged after step 4"):
            log.log(4, {})
        log.log(5, {})
        with pytest.raises(AssertionError, match="step 5 is logged after step 5"):
            log.log(5, {})


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, start_step=0) as log:
        log.text("answer", "$x$\n\n*y*", step=0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("answer/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "    $x$\n    \n    *y*"
