"""Groups of the first rank on the second one, through real processes, and packing alone."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_oreal.data.prompts import PromptCursor
from megatron_oreal.rollout import group_broadcast as sharing
from megatron_oreal.rollout.group_broadcast import in_thread, share
from megatron_oreal.rollout.group_codec import NumberedGroup, pack, unpack
from megatron_oreal.rollout.ledger import Ledger
from megatron_oreal.rollout.prefetch import PrefetchingCollector
from megatron_oreal.types import Group, Sample, Verdict
from tests.support.memory_engine import PARAMS, MemoryEngine, make_producer, make_prompts, make_tokenizer

PROMPTS = make_prompts(6)


def make_sample(number: int, response: list[int], **fields: object) -> Sample:
    prompt = PROMPTS[number]
    defaults: dict[str, object] = {
        "response_text": "",
        "rollout_logprobs": [-0.5] * len(response),
        "model_logprobs": [-0.25] * len(response),
        "finish_reason": "stop",
        "policy_version": 3,
    }
    return Sample(prompt.prompt.id, prompt.token_ids, response, **defaults | fields)  # type: ignore[arg-type]


GROUPS = [
    NumberedGroup(
        4,
        Group(
            PROMPTS[4].prompt,
            [
                make_sample(4, [5, 6, 2**31 - 1], verdict=Verdict(1.0, "correct", None)),
                make_sample(4, [7], policy_versions=[3], rollout_logprobs=[], verdict=Verdict(0.0, "timeout", None)),
                make_sample(4, [], verdict=Verdict(0.5, "incorrect", None)),
            ],
        ),
    ),
    NumberedGroup(0, Group(PROMPTS[0].prompt, []), is_chosen=False),
    NumberedGroup(
        4,
        Group(
            PROMPTS[4].prompt,
            [
                make_sample(4, [1, 2], policy_versions=[3, 4], model_logprobs=[], finish_reason="length"),
                make_sample(4, [3, 4], rollout_logprobs=[-float("inf"), -0.125], finish_reason="abort"),
            ],
        ),
        is_chosen=False,
    ),
]


def test_what_is_packed_is_unpacked() -> None:
    packed = pack(GROUPS)
    assert packed.dtype == torch.int32
    assert len(packed) == 1 + 3 * 3 + 6 * 5 + 8 + 3 + 7 + 6  # heads, then ids, versions, log-probs
    assert unpack(packed, PROMPTS) == GROUPS
    assert unpack(pack([]), PROMPTS) == []


def test_one_process_needs_no_group() -> None:
    assert share(in_thread(lambda: GROUPS), MemoryEngine(), PROMPTS, is_main=True) is GROUPS


def without_texts(groups: list[Group]) -> list[Group]:
    """What the other ranks know."""
    for group in groups:
        for sample in group.samples:
            assert sample.verdict is not None
            sample.response_text = ""
            sample.verdict = Verdict(sample.verdict.reward, sample.verdict.status, None)
    return groups


def share_on_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    sharing.HEARTBEAT_SECONDS = 0.05
    tokenizer = make_tokenizer(Path(folder) / f"rank{rank}")
    engine, results = MemoryEngine(), {}

    def slow() -> list[NumberedGroup]:
        time.sleep(0.4)  # several heartbeats
        return GROUPS

    def failing() -> list[NumberedGroup]:
        raise OSError("no server is left")

    def share_what(function: Callable[[], list[NumberedGroup]]) -> list[NumberedGroup]:
        return share(in_thread(function) if rank == 0 else Future(), engine, PROMPTS, is_main=rank == 0)

    results["slow"] = share_what(slow)
    with pytest.raises(OSError, match="no server is left"):
        share_what(failing)

    cursor = PromptCursor(make_prompts(), shuffle=True, seed=0)
    settings = {"staleness": 1, "oversampling": 1.5, "is_main": rank == 0}
    producer = make_producer(engine, tokenizer, Ledger(None), cursor.copy(), **settings)  # type: ignore[arg-type]
    collector = PrefetchingCollector(producer, cursor, rank == 0, first_step=0, num_steps=3)
    for step in range(3):
        collected = collector.collect(step)
        engine.update_weights([], step + 1)
        results[f"groups {step}"] = without_texts(collected.groups)
        results[f"sampled {step}"] = without_texts(collected.sampled)
        assert bool(collected.metrics) == (rank == 0)
    collector.close()

    results["evaluation"] = without_texts(producer.sampler.sample(PROMPTS, 2, PARAMS, "eval"))
    assert len(engine.asked) > 0 if rank == 0 else engine.asked == []
    torch.save(results, f"{folder}/results{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_what_the_first_one_made(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    mp.spawn(share_on_ranks, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"results{rank}.pt", weights_only=False) for rank in range(2))
    assert first["slow"] == GROUPS
    assert set(first) == set(second) and len(first) == 8
    for name in first:
        assert first[name] == second[name], name
