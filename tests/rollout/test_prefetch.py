"""Groups produced beside the training: order, bounds, errors, the end."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_oreal.data.prompts import PromptCursor
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.rollout.ledger import Ledger
from megatron_oreal.rollout.metrics import staleness_metrics
from megatron_oreal.rollout.prefetch import Collected, PrefetchingCollector
from megatron_oreal.rollout.producer import GroupProducer
from tests.support.memory_engine import PARAMS, MemoryEngine, make_producer, make_prompts, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_collector(
    engine: MemoryEngine, tokenizer: Tokenizer, staleness: int, ledger: Ledger | None = None, **settings: object
) -> PrefetchingCollector:
    cursor = PromptCursor(make_prompts(), shuffle=True, seed=0)
    producer = make_producer(engine, tokenizer, ledger or Ledger(None), cursor.copy(), staleness=staleness, **settings)
    return PrefetchingCollector(producer, cursor, is_main=True, first_step=0, num_steps=6)


def train(collector: PrefetchingCollector, engine: MemoryEngine, train_step: Callable[[int], None]) -> list[Collected]:
    """The loop, from the engine's version on."""
    collected = []
    for step in range(engine.version, 6):
        collected.append(collector.collect(step))
        train_step(step)
        engine.update_weights([], step + 1)
    return collected


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def ids_of(collected: list[Collected]) -> list[list[list[int]]]:
    return [[sample.response_ids.tolist() for group in c.groups for sample in group.samples] for c in collected]


def no_training(step: int) -> None:
    pass


def test_on_policy_groups_are_those_of_the_producer_alone(tokenizer: Tokenizer) -> None:
    engine, alone = MemoryEngine(), MemoryEngine()
    collector = make_collector(engine, tokenizer, staleness=0)
    producer, expected = make_producer(alone, tokenizer, Ledger(None)), []
    for step in range(6):
        alone.update_weights([], step)
        expected.append(
            [s.response_ids.tolist() for placed in producer.produce(step).groups for s in placed.group.samples]
        )

    def nothing_is_ahead(step: int) -> None:
        time.sleep(0.01)
        assert len(engine.asked) == 12 * (step + 1)

    collected = train(collector, engine, nothing_is_ahead)
    assert ids_of(collected) == expected
    assert all(staleness_metrics(c.groups, step)["rollout/staleness_max"] == 0 for step, c in enumerate(collected))
    assert collector.cursor.state() == producer.cursor.state()
    collector.close()


@pytest.mark.parametrize("staleness", [1, 2])
def test_steps_come_in_order_never_too_old_and_no_further_ahead(tokenizer: Tokenizer, staleness: int) -> None:
    """The training waits each time until everything that may be ahead is there."""
    engine = MemoryEngine()
    collector = make_collector(engine, tokenizer, staleness)
    prompts = PromptCursor(make_prompts(), shuffle=True, seed=0)

    def wait_for_what_may_be_ahead(step: int) -> None:
        last = min(step + staleness, 5)
        wait_until(lambda: set(collector.produced) == set(range(step + 1, last + 1)))
        time.sleep(0.01)
        assert len(engine.asked) == 12 * (last + 1)
        assert collector.cursor.state()["position"] == 3 * (step + 1)  # where the trained groups end

    collected = train(collector, engine, wait_for_what_may_be_ahead)
    for step, one in enumerate(collected):
        assert [group.prompt.id for group in one.groups] == [p.prompt.id for p in prompts.next_batch(3)]
        metrics = staleness_metrics(one.groups, step)
        assert metrics == {
            "rollout/staleness_mean": min(step, staleness),
            "rollout/staleness_max": min(step, staleness),
        }
    collector.close()


def test_weights_change_in_the_middle_of_a_response(tokenizer: Tokenizer) -> None:
    """The generation of step 1 begins, the trainer pushes version 1, the generation goes on with it."""
    engine = MemoryEngine()
    collector = make_collector(engine, tokenizer, staleness=1)
    first = collector.collect(0)
    assert {s.policy_version for group in first.groups for s in group.samples} == {0}
    reached, pushed, ticks = threading.Event(), threading.Event(), iter(range(1000))

    def pause_at_the_third_token() -> None:
        if next(ticks) == 3:
            reached.set()
            assert pushed.wait(30)

    wait_until(lambda: 1 in collector.produced)  # step 1 was begun by collect(0)
    engine.tick = pause_at_the_third_token
    engine.update_weights([], 1)
    collector.collect(1)  # begins step 2
    assert reached.wait(30)
    engine.update_weights([], 2)
    pushed.set()
    second = [sample for group in collector.collect(2).groups for sample in group.samples]
    longer = [sample for sample in second if len(sample.response_ids) > 3]
    assert longer and all(s.policy_versions.tolist() == [1] * 3 + [2] * (len(s.response_ids) - 3) for s in longer)
    assert {sample.policy_version for sample in second} == {1}
    collector.close()


def test_evaluation_goes_on_beside_it(tokenizer: Tokenizer) -> None:
    engine = MemoryEngine()
    collector = make_collector(engine, tokenizer, staleness=1)
    sampler, evaluated = collector.producer.sampler, []

    def evaluate(step: int) -> None:
        evaluated.append(sampler.sample(make_prompts(4), 2, PARAMS, "eval"))

    collected = train(collector, engine, evaluate)
    assert [len(groups) for groups in evaluated] == [4] * 6
    assert all(sample.is_judged for groups in evaluated for group in groups for sample in group.samples)
    assert len(collected) == 6
    collector.close()


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_error_of_the_engine_reaches_the_training(tokenizer: Tokenizer, staleness: int) -> None:
    engine = MemoryEngine()
    collector = make_collector(engine, tokenizer, staleness)
    collector.collect(0)
    engine.update_weights([], 1)
    if staleness:
        wait_until(lambda: 1 in collector.produced)
        collector.collect(1)
        engine.update_weights([], 2)
    step = engine.version
    wait_until(lambda: staleness == 0 or step in collector.produced)
    engine.close()
    if staleness:
        collector.collect(step)  # this one was there before
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.version = step + staleness
        collector.collect(step + staleness)
    collector.close()


def begin_and_hang(engine: MemoryEngine, collector: PrefetchingCollector) -> None:
    """The production of step 1 hangs in the middle of its generation until the collector is closed."""
    producer: GroupProducer = collector.producer
    reached = threading.Event()
    collector.collect(0)
    wait_until(lambda: 1 in collector.produced)
    num_before = engine.num_generated

    def hang() -> None:
        if engine.num_generated > num_before + 60:
            reached.set()
            wait_until(lambda: producer.is_stopped)

    engine.tick = hang
    engine.update_weights([], 1)
    collector.collect(1)
    assert reached.wait(30)


def test_closing_ends_what_is_under_way(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = MemoryEngine()
    with Ledger(tmp_path) as ledger:
        ledger.set_weights(0, "zero")
        ledger.set_weights(1, "one")
        collector = make_collector(engine, tokenizer, 1, ledger)
        begin_and_hang(engine, collector)
        collector.close()
        assert collector.thread is not None and not collector.thread.is_alive()
    assert (tmp_path / "step_000002.bin").stat().st_size > 0  # what had ended is kept


def test_a_collector_that_was_never_asked_closes(tokenizer: Tokenizer) -> None:
    make_collector(MemoryEngine(), tokenizer, 1).close()


@pytest.mark.parametrize("unfinished", ["drop", "resume"])
def test_a_run_ahead_resumes_where_the_training_was(tokenizer: Tokenizer, tmp_path: Path, unfinished: str) -> None:
    """Killed after step 2 was trained on and step 3 was ahead; the checkpoint is that of step 2's beginning."""
    settings = {"oversampling": 1.5, "unfinished": unfinished}
    with Ledger(tmp_path / "ledger") as ledger:
        engine = MemoryEngine()
        collector = make_collector(engine, tokenizer, 1, ledger, **settings)
        ledger.set_weights(0, "0")
        states, produced = [collector.cursor.state()], []
        for step in range(3):
            produced.append(collector.collect(step))
            wait_until(lambda step=step: step + 1 in collector.produced)  # type: ignore[misc]
            states.append(collector.cursor.state())
            engine.update_weights([], step + 1)
            ledger.set_weights(step + 1, str(step + 1))
        ahead = collector.collect(3)
        collector.close()
    with Ledger(tmp_path / "ledger", start_step=2) as ledger:
        engine = MemoryEngine()
        cursor = PromptCursor(make_prompts(), shuffle=True, seed=0)
        cursor.restore(states[2])
        engine.update_weights([], 2)
        ledger.set_weights(2, "2")
        producer = make_producer(engine, tokenizer, ledger, cursor.copy(), staleness=1, **settings)
        resumed = PrefetchingCollector(producer, cursor, is_main=True, first_step=2, num_steps=6)
        again = [resumed.collect(2)]
        wait_until(lambda: 3 in resumed.produced)
        assert engine.asked == []  # both were in the ledger
        engine.update_weights([], 3)
        ledger.set_weights(3, "3")
        again.append(resumed.collect(3))
        resumed.close()
    assert ids_of(again) == ids_of([produced[2], ahead])
