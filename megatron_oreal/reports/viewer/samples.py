"""Reads the samples that a run has written so far, also during the run.

It also reads rows with fewer or more fields: a field that is missing or has an unexpected type is unknown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

STEP_FILE = re.compile(r"step_(\d{1,15})\.jsonl")
OPINION_KEYS = ("status", "verdict", "is_correct", "correct", "reward")
# Statuses without a verdict, the same as types.UNJUDGED, whose import would load torch.
UNDECIDED = ("timeout", "crash", "judge_failed", "reward_failed")


@dataclass(slots=True)
class ViewedSample:
    """A row of a run's rollouts.

    Example: the third line of rollouts/step_000004.jsonl has step 4 and row 2.
    """

    step: int
    row: int  # the line's number in its file, from 0 on
    prompt_id: str
    source: str  # the data set; empty if the row does not name it
    prompt: str
    answer: str
    response: str
    status: str  # empty for a sample without a verdict
    extracted: str | None
    reward: float | None
    num_tokens: int | None
    logprob: float | None  # the engine's log-probability of the whole response
    finish_reason: str
    policy_version: int | None
    rules: str  # the status that the rules gave, before the judge's opinion
    judge: str | None  # the judge's status; None if the verifier asked no judge
    group: int = 0  # the number of its group among all that were read
    pass_rate: float | None = None  # the pass rate of its group; None if no sample of the group has a verdict
    difference: float | None = None  # mean |log-prob of the trainer - that of the engine| of a token, where recorded
    tokens: Mapping[str, object] | None = None  # the row of rollout_tokens/
    difficulty: float | None = None  # the pass rate of its prompt that was measured before training, where known

    @property
    def is_decided(self) -> bool:
        return bool(self.status) and self.status not in UNDECIDED

    @property
    def judge_disagrees(self) -> bool:
        """Returns whether both judge and rules decided, and only one accepts the response."""
        if self.judge not in ("correct", "incorrect") or not self.rules or self.rules in UNDECIDED:
            return False
        return (self.judge == "correct") != (self.rules == "correct")


@dataclass(slots=True)
class ViewedRun:
    """The samples of a run in the order of its files."""

    name: str
    samples: list[ViewedSample]
    notes: list[str]  # what could not be read, and what was dropped
    sources: set[str]  # the data sets of all samples that were read, including those not kept
    statuses: set[str]


def read_run(
    run_dir: Path,
    is_wanted: Callable[[int], bool] = lambda step: True,
    takes: Callable[[ViewedSample], bool] = lambda sample: True,
    limit: int | None = None,
    keeps_tokens: bool = True,
) -> ViewedRun:
    """Reads the wanted steps of a run directory and keeps the samples that `takes` accepts, the newest `limit` of them.

    Raises a one-line ValueError for a path without a run, a run without samples, or a damaged row before the last.
    """
    run = ViewedRun(run_dir.resolve().name, [], [], set(), set())
    known = step_files(run_dir)
    files = [(step, path) for step, path in known if is_wanted(step)]
    if not files:
        run.notes.append(f"none of these steps has samples: there are steps {known[0][0]} to {known[-1][0]}")
    steps: list[list[ViewedSample]] = []
    num_taken = num_groups = 0
    while files and (limit is None or num_taken < limit):
        step, path = files.pop()
        samples = read_step(step, path, num_groups, run.notes)
        add_tokens(samples, run_dir / "rollout_tokens" / path.name, run.notes, keeps_tokens)
        num_groups += len({sample.group for sample in samples})
        run.sources |= {sample.source for sample in samples}
        run.statuses |= {sample.status for sample in samples}
        steps.append(list(filter(takes, samples)))
        num_taken += len(steps[-1])
    run.samples = [sample for samples in reversed(steps) for sample in samples]
    if limit is not None and (files or num_taken > limit):
        run.samples = run.samples[-limit:]
        run.notes.append(f"only the newest {len(run.samples)} samples are shown: --limit N shows more")
    return run


def read_step(step: int, path: Path, first_group: int, notes: list[str]) -> list[ViewedSample]:
    """Reads the samples of a step; the groups are numbered from `first_group` on."""
    samples: list[ViewedSample] = []
    keys: list[object] = []
    for row, record in read_rows(path, notes):
        sample = read_sample(step, row, record)
        key = (record.get("group"), sample.prompt_id)
        if not keys or key != keys[-1]:
            keys.append(key)
        sample.group = first_group + len(keys) - 1
        samples.append(sample)
    add_pass_rates(samples)
    return samples


def step_files(run_dir: Path) -> list[tuple[int, Path]]:
    """Returns the steps that have samples, with their files, in the order of the steps."""
    if not run_dir.is_dir():
        problem = "is a file" if run_dir.exists() else "does not exist"
        raise ValueError(f"{run_dir} {problem}: give the run_dir of a training run")
    folder = run_dir / "rollouts"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [(int(match[1]), path) for path in files if (match := STEP_FILE.fullmatch(path.name)) and path.is_file()]
    if found:
        return sorted(found)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not a run's: it has no rollouts and no config.yaml; give a run_dir")
    raise ValueError(
        f"{run_dir} has no samples yet: `megatron-oreal train` writes them to rollouts/ after the first rollout; "
        "sft and eval write none there"
    )


def read_rows(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields each line's number and its object. Skips an incomplete last line, with a note."""
    lines = path.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError("no JSON object")
        except (ValueError, RecursionError) as error:
            if number < last:
                reason = " ".join(str(error).split())[:120]
                raise ValueError(f"{path} line {number + 1} cannot be read ({reason}): delete the line") from None
            notes.append(f"{path.parent.name}/{path.name}: the last line is torn, so its sample is left out")
            continue
        yield number, record


def read_sample(step: int, row: int, record: Mapping[str, object]) -> ViewedSample:
    status = text(record, "status")
    return ViewedSample(
        step=step,
        row=row,
        prompt_id=text(record, "prompt_id"),
        source=text(record, "source"),
        prompt=text(record, "prompt"),
        answer=text(record, "answer"),
        response=text(record, "response"),
        status=status,
        extracted=None if record.get("extracted") is None else text(record, "extracted"),
        reward=number(record, "reward"),
        num_tokens=whole_number(record, "num_tokens"),
        logprob=number(record, "logprob"),
        finish_reason=text(record, "finish_reason"),
        policy_version=whole_number(record, "policy_version"),
        rules=opinion_of(record.get("rules")) or status,
        judge=opinion_of(record.get("judge")),
        difficulty=number(record, "prompt_pass_rate"),
    )


def opinion_of(value: object) -> str | None:
    """Reads what a judge, or the rules beside a judge, said about a response, in any of the forms that a row may have.

    Returns a status such as "correct" or "incorrect"; None if there is none.

    Example: `"correct"`, `true`, `1.0`, `{"status": "correct"}` and `{"is_correct": true}` all give "correct". A status
    of another name, for example "timeout", is returned unchanged.
    """
    if isinstance(value, Mapping):
        return next((found for key in OPINION_KEYS if (found := opinion_of(value.get(key))) is not None), None)
    if isinstance(value, bool):
        return "correct" if value else "incorrect"
    if isinstance(value, int | float):
        return "correct" if value > 0 else "incorrect"
    if isinstance(value, str) and value.strip():
        word = value.strip()
        return word.lower() if word.lower() in ("correct", "incorrect") else word
    return None


def text(record: Mapping[str, object], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return ""


def number(record: Mapping[str, object], name: str) -> float | None:
    """Returns a finite number, else None."""
    return finite(record.get(name))


def finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def whole_number(record: Mapping[str, object], name: str) -> int | None:
    value = number(record, name)
    return None if value is None else int(value)


def add_tokens(samples: list[ViewedSample], path: Path, notes: list[str], keeps_tokens: bool) -> None:
    """Adds to the samples of a step the fields of their recorded tokens, if the run has recorded any."""
    if not path.is_file():
        return
    by_row = {sample.row: sample for sample in samples}
    for _, record in read_rows(path, notes):
        row = record.get("row")
        sample = by_row.get(row) if isinstance(row, int) else None
        if sample is None or not is_token_row(record):
            notes.append(f"{path.parent.name}/{path.name}: a row fits no sample, and is left out")
            continue
        sample.tokens = record if keeps_tokens else None
        differences = record.get("differences")
        if isinstance(differences, list):
            known = [abs(value) for each in differences if (value := finite(each)) is not None]
            sample.difference = sum(known) / len(known) if known else None


def is_token_row(record: Mapping[str, object]) -> bool:
    """Returns whether the row has a text for each token, and as many values of each kind."""
    texts = record.get("texts")
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        return False
    columns = [record[name] for name in ("logprobs", "differences", "weights") if name in record]
    if not all(isinstance(values, list) and len(values) == len(texts) for values in columns):
        return False
    advantages = record.get("advantages", [None])
    return isinstance(advantages, list) and len(advantages) in (1, len(texts))


def add_pass_rates(samples: list[ViewedSample]) -> None:
    decided: dict[int, list[bool]] = {}
    for sample in samples:
        if sample.is_decided:
            decided.setdefault(sample.group, []).append(sample.status == "correct")
    for sample in samples:
        if sample.group in decided:
            outcomes = decided[sample.group]
            sample.pass_rate = sum(outcomes) / len(outcomes)
