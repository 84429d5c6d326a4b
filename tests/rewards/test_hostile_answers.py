"""A hundred answers made to harm: nothing runs, each stays within its budget, and the verifier goes on as before."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_oreal.rewards import MathVerifier
from megatron_oreal.types import Verdict
from tests.support.hostile_answers import ENDLESS_ANSWER, HOSTILE_ANSWERS

CPU_SECONDS = 1.0
REFERENCES = ("x+1", r"\sqrt{2}", r"(-\infty, 2) \cup (3, \infty)", "1, 2", ENDLESS_ANSWER)
EASY = (r"So \boxed{2(k+1)}", "2k+2")


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(num_workers=1, cpu_seconds=CPU_SECONDS) as verifier:
        yield verifier


def worker_megabytes(verifier: MathVerifier) -> float:
    (worker,) = verifier.pool.workers.values()
    pages = int(Path(f"/proc/{worker.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def test_there_are_a_hundred() -> None:
    assert len(set(HOSTILE_ANSWERS)) >= 100


def test_nothing_runs_each_has_a_budget_and_the_pool_stays_healthy(
    verifier: MathVerifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verifier.verify(*EASY).status == "correct"
    slow: list[tuple[str, float]] = []
    for number, answer in enumerate(HOSTILE_ANSWERS):
        reference = REFERENCES[number % len(REFERENCES)]
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.process_time()
        verdict = verifier.verify(rf"So \boxed{{{answer}}}", reference)
        own_seconds = time.process_time() - started
        assert verdict.reward == 0.0, answer[:50]
        # What ended spent its budget once for the reference and once for the answer at most, and its start.
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = ended.ru_utime + ended.ru_stime - children.ru_utime - children.ru_stime
        if own_seconds > 0.5 or (spent > 0 and verdict.status == "timeout" and spent > 20 * CPU_SECONDS):
            slow.append((answer[:50], own_seconds))
    assert slow == []
    assert verifier.verify(*EASY).status == "correct"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat(verifier: MathVerifier) -> None:
    """The second time the same answers come, neither the worker nor this process grows."""
    # Those that end a worker or take a second are left out: a fresh worker is small again.
    answers = [answer for answer in HOSTILE_ANSWERS if "pmatrix" not in answer and answer[:1] not in "|x"]
    pairs = [(rf"\boxed{{{answer}}}", REFERENCES[number % 4]) for number, answer in enumerate(answers)]

    def judge_all() -> tuple[float, int]:
        verifier.verify_many(pairs)
        return worker_megabytes(verifier), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    judge_all()
    (worker_before, own_before), (worker_after, own_after) = judge_all(), judge_all()
    assert worker_after < worker_before + 30
    assert own_after < own_before + 30 * 1024
    assert verifier.verify(*EASY) == Verdict(1.0, "correct", "2(k+1)")
