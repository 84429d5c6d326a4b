"""Over-sampling, what becomes of what is given up, and runs that are killed, on an engine without a model."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_oreal.data.prompts import PromptCursor
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams, Watch
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rollout.ledger import Ledger
from megatron_oreal.rollout.pending_groups import PendingGroups, PromptRequest, StopCondition, sample_seed
from megatron_oreal.rollout.producer import GroupProducer, Produced
from megatron_oreal.types import Group, Prompt, Sample, Verdict
from tests.support.memory_engine import END, MemoryEngine, make_producer, make_prompts, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class KilledError(BaseException):
    pass


def samples(produced: Produced, chosen_only: bool = False) -> list[Sample]:
    return [s for placed in produced.groups if placed.is_chosen or not chosen_only for s in placed.group.samples]


def ids_of(produced: Produced) -> list[list[int]]:
    return [sample.response_ids.tolist() for sample in samples(produced)]


def without_times(produced: Produced) -> dict[str, float]:
    return {name: value for name, value in produced.metrics.items() if not name.startswith("time/")}


def push(producer: GroupProducer, step: int, fingerprint: str = "") -> None:
    """What the training does between two steps."""
    producer.sampler.engine.update_weights([], step)
    producer.ledger.set_weights(step, fingerprint or f"weights {step}")


def test_without_over_sampling_every_prompt_gives_its_group_in_order(tokenizer: Tokenizer) -> None:
    engine = MemoryEngine()
    produced = make_producer(engine, tokenizer, Ledger(None)).produce(0)
    cursor = PromptCursor(make_prompts(), shuffle=True, seed=0)
    assert [placed.group.prompt.id for placed in produced.groups] == [p.prompt.id for p in cursor.next_batch(3)]
    assert all(placed.is_chosen for placed in produced.groups)
    assert produced.cursor_state == cursor.state()
    assert [request.seed for request in engine.asked[:5]] == [
        sample_seed(f"0/0/{place}/{number}") for place, number in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0))
    ]
    for sample in samples(produced):
        assert sample.finish_reason == "stop" and sample.response_ids[-1] == END
        assert (sample.policy_version, sample.policy_versions.tolist()) == (0, [])
        assert sample.verdict is not None and sample.verdict.extracted in sample.response_text
    assert {sample.is_correct for sample in samples(produced)} == {True, False}
    assert without_times(produced)["rollout/num_given_up"] == 0
    times = [produced.metrics[f"time/in_rollout/{name}_response"] for name in ("first", "half", "nine_tenths", "last")]
    assert times == sorted(times)


def test_versions_are_kept_for_each_token(tokenizer: Tokenizer) -> None:
    """The weights change at the fifth tick; an engine that names no versions has those from when it was called."""
    for names_versions in (True, False):
        engine, ticks = MemoryEngine(), iter(range(1000))
        engine.names_versions = names_versions
        engine.tick = lambda engine=engine, ticks=ticks: setattr(engine, "version", int(next(ticks) >= 4))
        for sample in samples(make_producer(engine, tokenizer, Ledger(None)).produce(0)):
            length = len(sample.response_ids)
            assert sample.policy_version == 0
            expected = [0, 0, 0, 0] + [1] * (length - 4) if length > 4 else []
            assert sample.policy_versions.tolist() == (expected if names_versions else [])


def test_responses_that_the_engine_cuts_are_continued(tokenizer: Tokenizer) -> None:
    """An engine that gives up everything now and then, as some do when their weights change."""

    class CuttingEngine(MemoryEngine):
        def generate(
            self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
        ) -> list[Generation]:
            def impatient(index: int, generation: Generation) -> bool:
                assert watch is not None
                watch(index, generation)
                return True

            return super().generate(requests, params, impatient)

    cut, whole = CuttingEngine(), MemoryEngine()
    expected = make_producer(whole, tokenizer, Ledger(None)).produce(0)
    assert ids_of(make_producer(cut, tokenizer, Ledger(None)).produce(0)) == ids_of(expected)
    assert cut.num_generated == whole.num_generated


def test_an_engine_that_never_generates_is_an_error(tokenizer: Tokenizer) -> None:
    class IdleEngine(MemoryEngine):
        def generate(
            self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
        ) -> list[Generation]:
            return [Generation([], [], [], "abort") for _ in requests]

    with pytest.raises(RuntimeError, match="gave up 12 responses 20 times"):
        make_producer(IdleEngine(), tokenizer, Ledger(None)).produce(0)


def test_the_slowest_prompts_are_given_up_and_come_first_in_the_next_step(tokenizer: Tokenizer) -> None:
    engine = MemoryEngine()
    producer = make_producer(engine, tokenizer, Ledger(None), oversampling=2.0, unfinished="drop")
    first = producer.produce(0)
    asked = [p.prompt.id for p in PromptCursor(make_prompts(), shuffle=True, seed=0).next_batch(9)]
    chosen = [placed.group.prompt.id for placed in first.groups]
    assert len(chosen) == 3 and all(placed.is_chosen for placed in first.groups)
    assert chosen == [name for name in asked[:6] if name in chosen]  # in the prompts' order
    given_up = [name for name in asked[:6] if name not in chosen]
    whole = MemoryEngine()
    everything = make_producer(whole, tokenizer, Ledger(None), prompts_per_step=6).produce(0)
    longest = {placed.group.prompt.id: max(len(s.response_ids) for s in placed.group.samples)
               for placed in everything.groups}  # fmt: skip
    assert max(longest[name] for name in chosen) <= min(longest[name] for name in given_up)
    assert engine.num_generated < whole.num_generated
    assert first.metrics["rollout/num_given_up"] > 0
    push(producer, 1)
    engine.asked.clear()
    producer.produce(1)
    again = make_prompts()
    by_id = {prompt.prompt.id: prompt.token_ids.tolist() for prompt in again}
    assert [request.prompt_ids.tolist() for request in engine.asked[::4]] == [
        by_id[name] for name in given_up + asked[6:9]
    ]
    assert all(request.begun is None for request in engine.asked)


def test_no_prompt_is_lost_or_used_twice(tokenizer: Tokenizer) -> None:
    """Over an epoch, with a state that survives JSON; the given-up prompts are the only ones asked twice."""
    for unfinished in ("drop", "resume"):
        producer = make_producer(MemoryEngine(), tokenizer, Ledger(None), oversampling=1.5, unfinished=unfinished)
        trained: list[str] = []
        for step in range(8):
            push(producer, step)
            trained += [placed.group.prompt.id for placed in producer.produce(step).groups]
        pending = {turn.index for turn in producer.cursor.returned}
        assert len(trained) == len(set(trained)) == 24
        num_asked = producer.cursor.state()["position"]
        assert {f"p{index}" for index in producer.cursor._order[:num_asked]} == set(trained) | {
            f"p{index}" for index in pending
        }


def test_begun_responses_are_resumed_with_their_versions(tokenizer: Tokenizer) -> None:
    engine = MemoryEngine()
    producer = make_producer(engine, tokenizer, Ledger(None), oversampling=2.0, unfinished="resume")
    first = producer.produce(0)
    num_first = engine.num_generated
    push(producer, 1)
    engine.asked.clear()
    second = producer.produce(1)
    begun = [request for request in engine.asked if request.begun is not None]
    assert len(begun) == second.metrics["rollout/num_resumed"] == first.metrics["rollout/num_given_up"]
    assert all(set(request.begun.policy_versions) == {0} for request in begun if request.begun)
    mixed = [sample for sample in samples(second) if len(sample.policy_versions)]
    assert mixed and all(sorted(sample.policy_versions) == sample.policy_versions.tolist() for sample in mixed)
    assert all((sample.policy_versions[0], sample.policy_versions[-1]) == (0, 1) for sample in mixed)
    # What was begun is not generated again.
    num_kept = sum(len(sample.response_ids) for sample in [*samples(first), *samples(second)])
    num_begun = sum(len(request.begun.response_ids) for request in begun if request.begun)
    assert num_kept + second.metrics["rollout/num_tokens_given_up"] == engine.num_generated
    assert num_first - sum(len(s.response_ids) for s in samples(first)) >= num_begun > 0


def test_a_response_that_has_become_too_old_begins_anew(tokenizer: Tokenizer) -> None:
    engine = MemoryEngine()
    producer = make_producer(engine, tokenizer, Ledger(None), oversampling=2.0, unfinished="resume")
    producer.produce(0)
    for step in (1, 2):  # a run that was long away: the servers are two versions further
        push(producer, step)
    producer.ledger.records[2] = producer.ledger.records.pop(1)
    second = producer.produce(2)
    assert second.metrics["rollout/num_restarted"] > 0 and second.metrics["rollout/num_resumed"] == 0
    assert {sample.policy_version for sample in samples(second)} == {2}
    for step in range(3, 7):
        push(producer, step)
        assert all(step - sample.policy_version <= 1 for sample in samples(producer.produce(step)))


def test_only_mixed_groups_count_where_the_algorithm_needs_them(tokenizer: Tokenizer) -> None:
    """DAPO's rounds end, and over-sampling stops, when there are enough groups of both kinds."""
    settings = {"prompt_rounds": 4, "oversampling": 1.5, "group_size": 2}
    producer = make_producer(MemoryEngine(), tokenizer, Ledger(None), **settings)
    unused = []
    for step in range(5):
        push(producer, step)
        produced = producer.produce(step)
        chosen = [placed.group for placed in produced.groups if placed.is_chosen]
        assert len(chosen) == 3 and all(0 < group.pass_rate < 1 for group in chosen)
        unused += [placed.group for placed in produced.groups if not placed.is_chosen]
    assert unused and all(group.pass_rate in (0, 1) for group in unused)


def test_missing_correct_samples_are_drawn_again(tokenizer: Tokenizer) -> None:
    engine = MemoryEngine()
    producer = make_producer(engine, tokenizer, Ledger(None), draw_rounds=3)
    producer.num_correct = 4
    produced = producer.produce(0)
    sizes = [len(placed.group.samples) for placed in produced.groups]
    assert max(sizes) > 4
    for placed in produced.groups:
        before_the_last = placed.group.samples[:-4]
        assert sum(sample.is_correct for sample in before_the_last) < 4
    assert len({request.seed for request in engine.asked}) == sum(sizes)


SETTINGS: list[dict[str, object]] = [
    {},
    {"oversampling": 2.0},
    {"oversampling": 2.0, "unfinished": "resume"},
    {"prompt_rounds": 3, "draw_rounds": 2, "oversampling": 1.5, "unfinished": "resume"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kill_at", [3, 14, 40])
def test_a_killed_run_generates_only_what_is_missing(
    tokenizer: Tokenizer, tmp_path: Path, settings: dict[str, object], kill_at: int
) -> None:
    """Steps 0 to 3; the run is killed in step 2, `kill_at` ticks after it began, and goes on from checkpoint 1."""
    unbroken_engine = MemoryEngine()
    unbroken = make_producer(unbroken_engine, tokenizer, Ledger(tmp_path / "unbroken"), **settings)
    expected = [run_step(unbroken, step) for step in range(4)]

    engine = MemoryEngine()
    with Ledger(tmp_path / "killed") as ledger:
        killed = make_producer(engine, tokenizer, ledger, **settings)
        checkpoint = run_step(killed, 0).cursor_state
        ledger.remove_before(1)
        run_step(killed, 1)
        ticks = iter(range(kill_at))

        def kill() -> None:
            if next(ticks, None) is None:
                raise KilledError

        engine.tick = kill
        try:
            run_step(killed, 2)
        except KilledError:
            pass
    num_before, num_lost = engine.num_generated, engine.num_unfinished

    with Ledger(tmp_path / "killed", start_step=1) as ledger:
        cursor = PromptCursor(make_prompts(), shuffle=True, seed=0)
        cursor.restore(checkpoint)
        engine = MemoryEngine()
        resumed = make_producer(engine, tokenizer, ledger, cursor, **settings)
        produced = [run_step(resumed, step) for step in range(1, 4)]
    assert produced[0].notes and "in the ledger" in produced[0].notes[0]
    for ours, theirs in zip(produced, expected[1:], strict=True):
        assert ids_of(ours) == ids_of(theirs)
        assert [placed.is_chosen for placed in ours.groups] == [placed.is_chosen for placed in theirs.groups]
        assert [s.model_logprobs.tolist() for s in samples(ours)] == [
            s.model_logprobs.tolist() for s in samples(theirs)
        ]
        assert ours.cursor_state == theirs.cursor_state
        if "oversampling" not in settings:  # of what was given up, the ledger holds what is resumed
            assert without_times(ours) == without_times(theirs)
    assert engine.num_generated + num_before <= unbroken_engine.num_generated + num_lost


def run_step(producer: GroupProducer, step: int) -> Produced:
    push(producer, step)
    return producer.produce(step)


def test_other_weights_generate_anew(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Training that is not deterministic: the same step, other weights."""
    with Ledger(tmp_path) as ledger:
        run_step(make_producer(MemoryEngine(), tokenizer, ledger), 0)
    with Ledger(tmp_path) as ledger:
        engine = MemoryEngine()
        producer = make_producer(engine, tokenizer, ledger)
        push(producer, 0, "others")
        assert producer.produce(0).notes == []
        assert len(engine.asked) == 12


def test_each_response_is_on_disk_when_it_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine, seen = MemoryEngine(), []
    producer = make_producer(engine, tokenizer, Ledger(tmp_path))
    engine.tick = lambda: seen.append(
        sum(path.stat().st_size for path in tmp_path.glob("*.bin")) if producer.pending else 0
    )
    push(producer, 0)
    producer.produce(0)
    assert len(set(seen)) > 4 and seen == sorted(seen)


def test_a_full_disk_ends_the_step(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    producer = make_producer(MemoryEngine(), tokenizer, ledger)
    with Path("/dev/full").open("ab", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        ledger.files[0] = full
        producer.produce(0)


def judged(asked: PromptRequest, generations: Sequence[Generation]) -> Group:
    return Group(asked.prompt.prompt, [])


def test_a_harvest_takes_nothing_after_its_end() -> None:
    asked = [PromptRequest(prompt, "") for prompt in make_prompts(3)]
    pending = PendingGroups(asked, 2, judged, StopCondition(1, needs_mixed=False))
    whole, cut = Generation([1], [], [0.0], "stop", [0]), Generation([1], [], [0.0], "abort", [0])
    assert [pending(0, whole), pending(2, whole), pending(1, cut), pending(1, whole)] == [False, False, False, True]
    assert pending(3, whole)
    assert list(pending.groups()) == [0]
    pending.close()


class CountingVerifier(MathVerifier):
    num_groups = 0

    def verify_responses(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        verdicts = super().verify_responses(prompt, responses)
        self.num_groups += 1
        return verdicts


def test_groups_are_verified_while_others_are_generated(tokenizer: Tokenizer) -> None:
    """Before each token, the engine waits for the verdicts of the groups that are complete: it would wait for ever."""
    engine = MemoryEngine()
    producer = make_producer(engine, tokenizer, Ledger(None), prompts_per_step=6)
    producer.sampler.verifier = verifier = CountingVerifier()
    num_verified: list[int] = []

    def tick() -> None:
        deadline = time.monotonic() + 60
        while producer.pending is not None and verifier.num_groups < len(producer.pending.judged):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        num_verified.append(verifier.num_groups)

    engine.tick = tick
    metrics = producer.produce(0).metrics
    assert 0 < num_verified[-1] < verifier.num_groups == 6
    assert 1 <= metrics["time/verifier/longest_queue"] <= 6
    assert metrics["time/verifier/seconds"] > 0
    assert 0 <= metrics["time/verifier/seconds_after_generation"] <= metrics["time/verifier/seconds"] + 1


def test_an_error_of_the_verifier_comes_out(tokenizer: Tokenizer) -> None:
    producer = make_producer(MemoryEngine(), tokenizer, Ledger(None))
    without_answers = [replace(encoded, prompt=replace(encoded.prompt, answer="")) for encoded in make_prompts()]
    producer.cursor = PromptCursor(without_answers, shuffle=True, seed=0)
    with pytest.raises(ValueError, match="answer must not be empty"):
        producer.produce(0)
