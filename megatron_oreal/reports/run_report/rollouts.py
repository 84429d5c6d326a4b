"""Summarizes the samples of a run: pass rates by data set and by difficulty, verdicts, lengths, token weights.

A long run has more samples than a page needs, so this module reads evenly spaced steps, and at most MAX_BYTES.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from megatron_oreal.reports.run_report.charts import Curve
from megatron_oreal.reports.viewer.samples import STEP_FILE, ViewedSample, finite, read_rows, read_step

Item = TypeVar("Item")

MAX_STEPS = 40
MAX_BYTES = 100_000_000
MAX_SOURCES = 12  # most data sets with curves of their own; the largest come first
MAX_VALUES = 100_000  # most token weights in one histogram
# Difficulty is the pass rate before training: (upper bound, label).
DIFFICULTIES = (
    (0.0, "never solved"),
    (0.25, "up to 25 %"),
    (0.5, "up to 50 %"),
    (0.75, "up to 75 %"),
    (1.0, "above 75 %"),
)
GROUP_KINDS = ("none correct", "up to a quarter", "up to half", "up to three quarters", "more", "all correct")


@dataclass(slots=True)
class RolloutSummary:
    num_steps: int = 0  # the number of steps whose samples are on disk
    steps: list[int] = field(default_factory=list)  # the steps whose samples were read
    by_source: dict[str, Curve] = field(default_factory=dict)  # pass rate by data set
    by_difficulty: dict[str, Curve] = field(default_factory=dict)  # pass rate by measured difficulty
    group_kinds: dict[str, Curve] = field(default_factory=dict)  # share of the groups by their own pass rate
    statuses: dict[str, Curve] = field(default_factory=dict)  # share of the samples by verdict
    lengths: dict[int, list[float]] = field(default_factory=dict)  # {step: tokens of each response}, for a few steps
    weights: dict[int, list[float]] = field(default_factory=dict)  # {step: weight of each token}, for a few steps


def summarize_rollouts(run_dir: Path, notes: list[str]) -> RolloutSummary:
    """Reads rollouts/ and rollout_tokens/ if the run has them, and adds a note for each unreadable file."""
    known = numbered_files(run_dir / "rollouts")
    summary = RolloutSummary(num_steps=len(known))
    sources: Counter[str] = Counter()
    for step, path in chosen(known):
        try:
            samples = read_step(step, path, 0, notes)
        except (ValueError, OSError) as error:  # The files of an unfinished run may change at any time.
            notes.append(str(error))
            continue
        if samples:
            summary.steps.append(step)
            add_step(summary, step, samples, sources)
    kept = {source for source, _ in sources.most_common(MAX_SOURCES)}
    summary.by_source = {name: curve for name, curve in summary.by_source.items() if name in kept}
    if len(sources) > MAX_SOURCES:
        notes.append(f"only the {MAX_SOURCES} largest of {len(sources)} data sets have curves")
    summary.lengths = {step: summary.lengths[step] for step in spread(sorted(summary.lengths), 3)}
    for step, path in spread(numbered_files(run_dir / "rollout_tokens"), 3):
        try:
            summary.weights[step] = read_weights(path, notes)
        except (ValueError, OSError) as error:
            notes.append(str(error))
    return summary


def add_step(summary: RolloutSummary, step: int, samples: Sequence[ViewedSample], sources: Counter[str]) -> None:
    decided = [sample for sample in samples if sample.is_decided]
    sources.update(sample.source or "unnamed" for sample in samples)
    add_rates(summary.by_source, step, decided, lambda sample: sample.source or "unnamed")
    measured = [sample for sample in decided if sample.difficulty is not None]
    add_rates(summary.by_difficulty, step, measured, difficulty)
    rates = {sample.group: sample.pass_rate for sample in samples if sample.pass_rate is not None}
    add_shares(summary.group_kinds, step, [group_kind(rate) for rate in rates.values()])
    add_shares(summary.statuses, step, [sample.status or "without verdict" for sample in samples])
    summary.lengths[step] = [float(sample.num_tokens) for sample in samples if sample.num_tokens is not None]


def add_rates(
    curves: dict[str, Curve], step: int, samples: Sequence[ViewedSample], name: Callable[[ViewedSample], str]
) -> None:
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        outcomes[name(sample)].append(sample.status == "correct")
    for label, found in outcomes.items():
        curves.setdefault(label, {})[step] = sum(found) / len(found)


def add_shares(curves: dict[str, Curve], step: int, labels: Sequence[str]) -> None:
    for label, count in Counter(labels).items():
        curves.setdefault(label, {})[step] = count / len(labels)


def difficulty(sample: ViewedSample) -> str:
    assert sample.difficulty is not None, "the caller has chosen samples of a known difficulty"
    rate = sample.difficulty
    return next((label for bound, label in DIFFICULTIES if rate <= bound), DIFFICULTIES[-1][1])


def group_kind(rate: float) -> str:
    if rate in (0, 1):
        return GROUP_KINDS[0] if rate == 0 else GROUP_KINDS[-1]
    return GROUP_KINDS[1 + sum(rate > bound for bound in (0.25, 0.5, 0.75))]


def read_weights(path: Path, notes: list[str]) -> list[float]:
    values: list[float] = []
    for _, record in read_rows(path, notes):
        weights = record.get("weights")
        if isinstance(weights, list):
            values += [value for each in weights if (value := finite(each)) is not None]
        if len(values) >= MAX_VALUES:
            break
    return values


def numbered_files(folder: Path) -> list[tuple[int, Path]]:
    files = folder.iterdir() if folder.is_dir() else []
    return sorted((int(match[1]), path) for path in files if (match := STEP_FILE.fullmatch(path.name)))


def chosen(files: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """Returns evenly spaced files, including the first and the last; fewer if the files are large."""
    sizes = [path.stat().st_size for _, path in files if path.is_file()]
    mean_size = sum(sizes) / len(sizes) if sizes else 0
    return spread(files, max(2, min(MAX_STEPS, int(MAX_BYTES / max(1.0, mean_size)))))


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Returns `count` of the items, evenly spaced, with the first and the last: of 0..9, 4 are 0, 3, 6, 9."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]
