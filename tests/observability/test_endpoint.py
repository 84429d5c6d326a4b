"""The endpoint for Prometheus: what it tells, and the dashboard that shows it."""

from __future__ import annotations

import json
import math
import re
from urllib.request import urlopen

import pytest

from megatron_oreal.observability.endpoint import PHASES, PREFIX, Endpoint, Observed, RunCollector
from megatron_oreal.observability.metrics import PhaseTimer
from tests.support.metric_names import documented, is_documented
from tests.support.paths import ROOT

pytest.importorskip("prometheus_client")
DASHBOARD = ROOT / "examples" / "grafana" / "dashboard.json"
SEEN = Observed(
    run="first",
    rank=0,
    step=7,
    num_steps=90,
    phase="update",
    phase_seconds=1.5,
    record={"step": 6, "reward/mean": 0.25, "policy/loss": math.nan, "time/rollout_tokens_per_second": 1200.0},
    queues={"groups_to_verify": 3},
    servers={"living": 2, "dead": 0},
    gpu_memory_bytes={"allocated": 2**30},
)


def answer(port: int) -> dict[str, float]:
    """The samples of /metrics, by name and labels as they are written."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_it_tells_what_the_run_does() -> None:
    with Endpoint("127.0.0.1", 0, lambda: SEEN) as endpoint:
        told = answer(endpoint.port)
    assert told[f"{PREFIX}_step"] == 7 and told[f"{PREFIX}_num_steps"] == 90
    assert told[f'{PREFIX}_run_info{{rank="0",run="first"}}'] == 1
    assert {phase: told[f'{PREFIX}_phase{{phase="{phase}"}}'] for phase in PHASES} == {
        phase: float(phase == "update") for phase in PHASES
    }
    assert told[f"{PREFIX}_phase_seconds"] == 1.5
    assert told[f'{PREFIX}_tokens_per_second{{phase="rollout"}}'] == 1200
    assert told[f'{PREFIX}_queue_depth{{queue="groups_to_verify"}}'] == 3
    assert told[f'{PREFIX}_servers{{state="living"}}'] == 2
    assert told[f'{PREFIX}_gpu_memory_bytes{{kind="allocated"}}'] == 2**30
    assert told[f'{PREFIX}_metric{{name="reward/mean"}}'] == 0.25
    assert math.isnan(told[f'{PREFIX}_metric{{name="policy/loss"}}'])


def test_each_request_asks_anew_and_the_port_is_free_afterwards() -> None:
    steps = iter(range(5))

    def observe() -> Observed:
        return Observed("first", 0, next(steps), 90, "other", 0.0, {})

    with Endpoint("127.0.0.1", 0, observe) as endpoint:
        port = endpoint.port
        assert [answer(port)[f"{PREFIX}_step"] for _ in range(2)] == [0, 1]
        with pytest.raises(OSError, match="in use"):
            Endpoint("127.0.0.1", port, observe)
    with Endpoint("127.0.0.1", port, observe):
        assert answer(port)[f"{PREFIX}_step"] == 2


def test_the_phase_that_runs() -> None:
    seconds = iter([0.0, 1.0, 3.5, 4.0])
    timer = PhaseTimer(clock=lambda: next(seconds))
    assert timer.under_way() == ("other", 0.0)
    with timer("rollout"):
        assert timer.under_way() == ("rollout", 2.5)
    assert timer.under_way() == ("other", 0.0)


def test_phases_are_those_of_the_loop() -> None:
    calls = re.findall(r"run\.timer\(\"(\w+)\"\)", (ROOT / "megatron_oreal" / "train.py").read_text())
    assert {*PHASES} == {*calls, "other"}


def test_the_dashboard_shows_what_is_exported() -> None:
    text = DASHBOARD.read_text()
    shown = set(re.findall(rf"{PREFIX}_\w+", text))
    assert shown == {family.name for family in RunCollector(lambda: SEEN).collect()}
    queries = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    names = [name for query in queries for name in re.findall(r'name="([^"]+)"', query)]
    assert names and all(map(is_documented, names))
    patterns = [re.compile(name) for query in queries for name in re.findall(r'name=~"([^"]+)"', query)]
    filled = [re.sub(r"<\w+>", "x", name) for name in documented()]
    assert patterns and all(any(pattern.fullmatch(name) for name in filled) for pattern in patterns)
    known = {"phase", "queue", "state", "kind", "name", "run", "rank", "instance"}
    assert set(re.findall(r"\{\{(\w+)\}\}", text)) <= known
