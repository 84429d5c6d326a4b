"""Measures the cost of token data between an engine and the models: arrays beside Python lists, in one run.

    OMP_NUM_THREADS=1 python tools/bench/bench_packing.py

The benchmark encodes finished responses for the broadcast, decodes them as the other ranks do, and packs them into
micro-batches. "lists" holds token ids and log-probs in Python lists; "arrays" is `megatron_oreal.rollout.group_codec`
with `megatron_oreal.data.packing`. Each measurement runs in a separate process, and both must give the same
micro-batches. Memory is the process's peak beyond its use before the responses; it includes the responses themselves.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import click
import numpy as np
import torch
from torch import Tensor

from megatron_oreal.algorithms.sample_selection import training_sequence
from megatron_oreal.data.packing import PackingPlan, assign, pack
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.rollout import group_codec
from megatron_oreal.rollout.group_codec import NumberedGroup
from megatron_oreal.types import Group, Microbatch, Prompt, Sample, Verdict

CASES = ("1024x14000", "8192x8000")
GROUP_SIZE, PROMPT_TOKENS, VOCAB_SIZE = 16, 128, 151_936
BALANCE_RANKS, BALANCE_TOKENS = 16, 16_384
PAIR_COST = 1.4e-5  # of Qwen2.5-7B, see attention_pair_cost in megatron_oreal/run/device_defaults.py
FIELDS = ("input_ids", "labels", "position_ids", "loss_mask", "sequence_ids", "advantages", "engine_logprobs")


@dataclass(slots=True)
class ListSample:
    """A response that holds its tokens' values in lists, without the fields that do not belong to a token."""

    prompt_ids: list[int]
    response_ids: list[int]
    rollout_logprobs: list[float]
    model_logprobs: list[float]


@dataclass(slots=True)
class Measured:
    seconds: float
    cpu_seconds: float
    gib: float
    checksums: list[float]


def integers(rows: Iterable[Sequence[int]]) -> np.ndarray:
    return np.fromiter((value for row in rows for value in row), dtype=np.int32)


def floats(rows: Iterable[Sequence[float]]) -> np.ndarray:
    return np.fromiter((value for row in rows for value in row), dtype=np.float32).view(np.int32)


def broadcast_lists(samples: list[ListSample]) -> list[ListSample]:
    """Encodes the samples, frees them as if another rank did the rest, and decodes them."""
    prompt_ids, lengths = samples[0].prompt_ids, [len(sample.response_ids) for sample in samples]
    parts = [
        integers(sample.response_ids for sample in samples),
        floats(sample.rollout_logprobs for sample in samples),
        floats(sample.model_logprobs for sample in samples),
    ]
    packed = np.concatenate(parts)
    del parts
    samples.clear()
    borders = np.cumsum(lengths * 3)[:-1]
    rows = np.split(packed, borders)
    ids, rollout, model = (rows[part * len(lengths) : (part + 1) * len(lengths)] for part in range(3))
    return [
        ListSample(prompt_ids, one.tolist(), two.view(np.float32).tolist(), three.view(np.float32).tolist())
        for one, two, three in zip(ids, rollout, model, strict=True)
    ]


def pack_lists(samples: Sequence[ListSample], plan: PackingPlan) -> list[Microbatch]:
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in samples]
    bins = assign(lengths, plan.data_size, plan.microbatch_tokens)[plan.data_rank]
    return [build_from_lists([samples[number] for number in bin_]) for bin_ in bins]


def build_from_lists(samples: Sequence[ListSample]) -> Microbatch:
    tokens = [sample.prompt_ids + sample.response_ids for sample in samples]
    lengths = torch.tensor([len(ids) for ids in tokens])
    input_ids = torch.tensor([token for ids in tokens for token in ids], dtype=torch.int64)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    sequence_ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position_ids = torch.arange(len(input_ids)) - cu_seqlens[sequence_ids]
    prompt_lengths = torch.tensor([len(sample.prompt_ids) for sample in samples])
    is_response = position_ids >= prompt_lengths[sequence_ids] - 1
    loss_mask = is_response & (position_ids < lengths[sequence_ids] - 1)
    advantages = torch.ones(len(samples))
    logprobs = [value for sample in samples for value in sample.model_logprobs or [math.nan] * len(sample.response_ids)]
    engine_logprobs = torch.zeros(len(input_ids))
    engine_logprobs[loss_mask] = torch.tensor(logprobs)
    return Microbatch(
        input_ids=input_ids,
        labels=input_ids.roll(-1),
        position_ids=position_ids,
        cu_seqlens=cu_seqlens.int(),
        max_seqlen=int(lengths.max()),
        loss_mask=loss_mask,
        sequence_ids=sequence_ids,
        advantages=torch.where(loss_mask, advantages[sequence_ids], 0.0),
        is_correct=torch.ones(len(samples), dtype=torch.bool),
        engine_logprobs=engine_logprobs,
    )


def make_responses(number: int, length: int) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns response ids, rollout log-probs and model log-probs; lengths differ by up to six tokens."""
    random = np.random.default_rng(0)
    for index in range(number):
        size = length - index % 7
        logprobs = -random.random((2, size), dtype=np.float32)
        yield random.integers(0, VOCAB_SIZE, size, dtype=np.int32), logprobs[0].copy(), logprobs[1].copy()


def make_prompt() -> EncodedPrompt:
    return EncodedPrompt(Prompt("p", (), "1"), np.arange(300, 300 + PROMPT_TOKENS, dtype=np.int32))


def prepare_lists(number: int, length: int, plan: PackingPlan) -> Callable[[], list[Microbatch]]:
    prompt_ids = make_prompt().token_ids.tolist()
    samples = [ListSample(prompt_ids, *(a.tolist() for a in arrays)) for arrays in make_responses(number, length)]
    return lambda: pack_lists(broadcast_lists(samples), plan)


def prepare_arrays(number: int, length: int, plan: PackingPlan) -> Callable[[], list[Microbatch]]:
    prompt, verdict = make_prompt(), Verdict(1.0, "correct", "1")
    samples = [
        Sample("p", prompt.token_ids, ids, "", rollout, model, "stop", 0, verdict)
        for ids, rollout, model in make_responses(number, length)
    ]
    groups = [
        NumberedGroup(0, Group(prompt.prompt, samples[begin : begin + GROUP_SIZE]))
        for begin in range(0, number, GROUP_SIZE)
    ]
    samples.clear()

    def run() -> list[Microbatch]:
        packed = group_codec.pack(groups)
        groups.clear()
        received = group_codec.unpack(packed, [prompt])
        sequences = [training_sequence(sample, 1.0) for numbered in received for sample in numbered.group.samples]
        return pack(sequences, plan).microbatches

    return run


PREPARE = {"lists": prepare_lists, "arrays": prepare_arrays}


def measure(name: str, number: int, length: int, plan: PackingPlan) -> Measured:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = PREPARE[name](number, length, plan)
    start, cpu_start = time.perf_counter(), time.process_time()
    microbatches = run()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    gib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return Measured(seconds, cpu_seconds, gib, [checksum(microbatches, field) for field in FIELDS])


def checksum(microbatches: Sequence[Microbatch], field: str) -> float:
    total = 0.0
    for number, microbatch in enumerate(microbatches):
        values: Tensor = getattr(microbatch, field)
        total += float((number + 1) * (values.double() * torch.linspace(1, 2, len(values), dtype=torch.float64)).sum())
    return total


def print_balance(recorded: np.ndarray | None) -> None:
    """Prints how evenly balancing by tokens and by FLOPs loads 16 ranks with micro-batches of 16,384 tokens."""
    random = np.random.default_rng(0)
    mixes: dict[str, np.ndarray] = {} if recorded is None else {f"{len(recorded)} recorded lengths": recorded}
    for number in (256, 1024, 8192):
        mixes[f"{number} log-normal lengths"] = np.clip(random.lognormal(np.log(3000), 1.2, number), 64, BALANCE_TOKENS)
    for name, mix in mixes.items():
        lengths = mix.astype(int)
        flops = lengths + PAIR_COST * lengths.astype(float) ** 2
        for by, pair_cost in (("tokens", 0.0), ("FLOPs", PAIR_COST)):
            start = time.perf_counter()
            ranks = assign(lengths.tolist(), BALANCE_RANKS, BALANCE_TOKENS, pair_cost=pair_cost)
            seconds = time.perf_counter() - start
            loads = [sum(flops[number] for bin_ in bins for number in bin_) for bins in ranks]
            full = sum(len(bins) for bins in ranks) * BALANCE_TOKENS
            click.echo(
                f"{name}, by {by}: the busiest rank has {max(loads) / np.mean(loads) - 1:.2%} more FLOPs than the "
                f"mean; {lengths.sum() / full:.1%} of the micro-batches' room is used; {seconds * 1e3:.0f} ms"
            )


@click.command()
@click.option("--balance", is_flag=True, help="Measure how evenly 16 ranks are loaded instead; takes a second.")
@click.option(
    "--lengths", type=click.Path(exists=True, dir_okay=False), help="For --balance: a file with a length in each line."
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--microbatch-tokens", default=32_768, show_default=True)
@click.option("--data-size", default=1, show_default=True, help="Data-parallel ranks that share the micro-batches.")
@click.option(
    "--case", "cases", multiple=True, default=CASES, show_default=True, help="RESPONSESxTOKENS, several times."
)
def main(
    balance: bool, lengths: str | None, rounds: int, microbatch_tokens: int, data_size: int, cases: tuple[str, ...]
) -> None:
    """Prints both rivals' seconds, CPU seconds and peak memory as medians of the rounds, and their ratios."""
    if balance:
        recorded = None if lengths is None else np.loadtxt(lengths, dtype=np.int64, ndmin=1)
        print_balance(recorded)
        return
    plan = PackingPlan(0, data_size, microbatch_tokens)
    context = multiprocessing.get_context("spawn")
    for case in cases:
        number, length = map(int, case.split("x"))
        measured: dict[str, list[Measured]] = {name: [] for name in PREPARE}
        for _ in range(rounds):
            for name in PREPARE:  # alternates, so that a busy machine slows both
                with ProcessPoolExecutor(1, context) as pool:
                    measured[name].append(pool.submit(measure, name, number, length, plan).result())
        assert measured["lists"][0].checksums == measured["arrays"][0].checksums, "the micro-batches differ"
        click.echo(f"{number} responses of {length} tokens")
        medians = {}
        for name, results in measured.items():
            seconds, cpu, gib = (
                statistics.median(getattr(result, field) for result in results)
                for field in ("seconds", "cpu_seconds", "gib")
            )
            medians[name] = cpu
            click.echo(f"  {name:7s} {seconds:8.2f} s {cpu:8.2f} s of CPU {gib:7.2f} GiB")
        click.echo(f"  lists / arrays: {medians['lists'] / medians['arrays']:.1f} of the CPU seconds")


if __name__ == "__main__":
    main()
