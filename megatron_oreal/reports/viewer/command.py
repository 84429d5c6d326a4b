"""Implements `megatron-oreal view`: reads a run, and prints a table or writes a page."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from megatron_oreal.reports.viewer.page import check_out, write_page
from megatron_oreal.reports.viewer.samples import ViewedRun, ViewedSample, read_run
from megatron_oreal.reports.viewer.selection import ANY, ORDERS, Filters, check_names, in_order, parse_bounds
from megatron_oreal.reports.viewer.table import samples_table, whole_samples

PAGE_LIMIT = 20000  # samples on a page, unless another limit is given
TABLE_LIMIT = 20
# Limits within which browsers open a page quickly; V8 accepts at most 512 million characters of text.
PAGE_CHARACTERS = 200_000_000
PAGE_TOKENS = 3_000_000


def read_filters(
    *,
    steps: str,
    reward: str,
    tokens: str,
    sources: Sequence[str],
    statuses: Sequence[str],
    disagreements: bool,
    search: str,
) -> Filters:
    """Reads the command line's filters; an empty interval has no bound. Raises ValueError naming the option."""
    return Filters(
        steps=parse_bounds(steps, "--steps") if steps else ANY,
        rewards=parse_bounds(reward, "--reward") if reward else ANY,
        tokens=parse_bounds(tokens, "--tokens") if tokens else ANY,
        sources=tuple(sources),
        statuses=tuple(statuses),
        disagreements=disagreements,
        search=search,
    )


def view_as_page(run_dir: Path, filters: Filters, limit: int | None, out: Path) -> list[str]:
    """Writes the page with the newest samples that pass the filters, and returns lines for the user."""
    check_out(out)
    run = read_filtered(run_dir, filters, limit or PAGE_LIMIT, keeps_tokens=True)
    keep_what_fits(run)
    size = write_page(out, run)
    return [*run.notes, f"{out}: {len(run.samples)} samples, {size / 1e6:.1f} MB"]


def keep_what_fits(run: ViewedRun, most_characters: int = PAGE_CHARACTERS, most_tokens: int = PAGE_TOKENS) -> None:
    """Drops the oldest samples, and the tokens of older ones, if the page would be too large for a browser."""
    lengths = [len(sample.prompt) + len(sample.answer) + len(sample.response) for sample in reversed(run.samples)]
    num_fitting = bisect.bisect_right(list(accumulate(lengths)), most_characters)
    if num_fitting < len(run.samples):
        run.samples = run.samples[len(run.samples) - num_fitting :]
        run.notes.append(f"only the newest {num_fitting} samples fit on a page: choose others with --steps")
    recorded = [sample for sample in reversed(run.samples) if sample.tokens is not None]
    num_fitting = bisect.bisect_right(list(accumulate(map(num_recorded_tokens, recorded))), most_tokens)
    for sample in recorded[num_fitting:]:
        sample.tokens = None
    if num_fitting < len(recorded):
        run.notes.append(
            f"only the tokens of the newest {num_fitting} samples fit on a page: choose others with --steps"
        )


def num_recorded_tokens(sample: ViewedSample) -> int:
    texts = (sample.tokens or {}).get("texts")
    return len(texts) if isinstance(texts, list) else 0


def view_as_table(
    run_dir: Path, filters: Filters, limit: int | None, order: str, full: bool, width: int
) -> tuple[str, list[str]]:
    """Returns the first samples in the requested order as text, and notes for the user."""
    if order not in ORDERS:
        raise ValueError(f"--sort: {order!r} is no order; give one of {', '.join(ORDERS)}")
    run = read_filtered(run_dir, filters, None, keeps_tokens=False)
    chosen = in_order(run.samples, order)[: limit or TABLE_LIMIT]
    notes = [*run.notes, f"{len(chosen)} of {len(run.samples)} samples that fit"]
    if not chosen:
        return "", notes
    return whole_samples(chosen, width) if full else samples_table(chosen, width), notes


def read_filtered(run_dir: Path, filters: Filters, limit: int | None, keeps_tokens: bool) -> ViewedRun:
    """Reads the samples. Raises ValueError if none is left and a data set or a status is not known."""

    def is_wanted(step: int) -> bool:
        return filters.steps.holds(step)

    run = read_run(run_dir, is_wanted, replace(filters, steps=ANY).hold, limit, keeps_tokens)
    if not run.samples and run.statuses:
        check_names(filters, run.sources, run.statuses)
    return run
