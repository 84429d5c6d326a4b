"""`megatron-oreal passrate` samples every prompt and writes the share of correct responses into a copy of its file.

OREAL repeats prompts by their pass rate (`data.repeats_by_pass_rate`); this measures it with the model of the
configuration. Finished batches are kept in RUN_DIR/pass_rates/NAME.jsonl, so that a killed run continues after the last
one and ends with the numbers of an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_oreal.config import EvalRunConfig
from megatron_oreal.data.files import Row, read_jsonl, write_jsonl
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.parallel.collectives import broadcast_object
from megatron_oreal.reports.curves import format_table
from megatron_oreal.run.open import open_eval
from megatron_oreal.run.run import EvalRun
from megatron_oreal.types import Group, Prompt


@dataclass(slots=True, frozen=True)
class PassRate:
    """The counts of a prompt's correct and judged samples. `question` is a digest of the question and its answer."""

    id: str
    question: str
    num_samples: int
    num_judged: int
    num_correct: int

    @property
    def pass_rate(self) -> float | None:
        """Returns the pass rate, or None if the verifier could judge no sample."""
        return self.num_correct / self.num_judged if self.num_judged else None


RECORD = TypeAdapter(PassRate)


def measure_pass_rates(config: EvalRunConfig) -> str | None:
    """Measures every prompt of `eval.prompts` and returns the table to print, on the first rank.

    RUN_DIR/prompts/NAME.jsonl is the prompts file with "pass_rate" in each row that was asked. Raises ValueError for
    bad input.
    """
    if not config.eval.num_samples:
        raise ValueError("eval.num_samples=0 samples nothing, so there is no pass rate: give 8 or more")
    sampled = config.model_copy(update={"eval": config.eval.model_copy(update={"greedy": False})})
    with open_eval(sampled) as run:
        measured = {name: measure(run, name) for name in config.eval.prompts}
        if not run.layout.is_main:
            return None
        for name, records in measured.items():
            write_jsonl(measured_prompts_path(run, name), rows_with_rates(config.eval.prompts[name], name, records))
        return format_pass_rates(run, measured)


def measure(run: EvalRun, name: str) -> list[PassRate]:
    """Samples the batches that are not done yet. Every rank takes part; the first rank writes the results to disk."""
    config, prompts = run.config.eval, run.datasets[name]
    path = run.config.run_dir / "pass_rates" / f"{name}.jsonl"
    records: list[PassRate] = []
    if run.layout.is_main:
        records = read_finished(path, prompts, name, config.prompts_per_batch)
    records = broadcast_object(records)
    run.progress.advance(len(records) * config.num_samples)
    if records:
        run.progress.note(f"{name}: {len(records)} of {len(prompts)} prompts were measured before")
    for start in range(len(records), len(prompts), config.prompts_per_batch):
        batch = prompts[start : start + config.prompts_per_batch]
        seed = f"{run.config.seed}/passrate/{name}/{start}"
        found = list(map(pass_rate_of, run.sampler.sample(batch, config.num_samples, run.sampling, seed)))
        if run.layout.is_main:
            append(path, found)
        records += found
        run.progress.advance(len(batch) * config.num_samples, dataset=name)
    return records


def pass_rate_of(group: Group) -> PassRate:
    judged = group.judged_samples
    num_correct = sum(sample.is_correct for sample in judged)
    return PassRate(group.prompt.id, digest(group.prompt), len(group.samples), len(judged), num_correct)


def digest(prompt: Prompt) -> str:
    text = json.dumps([[(message.role, message.content) for message in prompt.messages], prompt.answer])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def append(path: Path, records: Sequence[PassRate]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def read_finished(path: Path, prompts: Sequence[EncodedPrompt], name: str, batch_size: int) -> list[PassRate]:
    """Returns the records of all whole batches, and cuts off what a kill left of another one.

    Raises ValueError where the records are of other prompts.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    records = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            records.append(RECORD.validate_json(line))
        except ValidationError:
            raise ValueError(f"{path} line {number} is no record of a pass rate; remove the file") from None
    if len(records) != len(prompts):
        del records[len(records) - len(records) % batch_size :]
    asked = [(prompt.prompt.id, digest(prompt.prompt)) for prompt in prompts[: len(records)]]
    if [(record.id, record.question) for record in records] != asked:
        raise ValueError(
            f"eval.prompts.{name} is not the file whose pass rates this run_dir has measured; give another run_dir or "
            "another name"
        )
    write_atomically(path, b"".join(json.dumps(asdict(r), ensure_ascii=False).encode() + b"\n" for r in records))
    return records


def measured_prompts_path(run: EvalRun, name: str) -> Path:
    return run.config.run_dir / "prompts" / f"{name}.jsonl"


def rows_with_rates(source: Path, name: str, records: Sequence[PassRate]) -> list[Row]:
    """Returns the rows of the prompts file with all their keys. A row that was not sampled keeps its pass rate."""
    rates = {record.id: record.pass_rate for record in records}
    rows = []
    for _, row in read_jsonl(source, f"eval.prompts.{name}"):
        id_ = str(row["id"])
        rows.append(row | {"pass_rate": rates[id_]} if id_ in rates else row)
    return rows


def format_pass_rates(run: EvalRun, measured: Mapping[str, Sequence[PassRate]]) -> str:
    """Returns a line for each dataset: how many prompts are never, sometimes and always solved, and the new file."""
    lines: list[list[object]] = []
    for name, records in measured.items():
        rates = [rate for record in records if (rate := record.pass_rate) is not None]
        never, always = sum(rate == 0 for rate in rates), sum(rate == 1 for rate in rates)
        mean = sum(rates) / len(rates) if rates else None
        unjudged = len(records) - len(rates)
        lines.append([name, len(records), mean, never, len(rates) - never - always, always, unjudged])
    header = ["dataset", "prompts", "mean pass rate", "never", "sometimes", "always", "unjudged"]
    paths = "\n".join(f"{name}: {measured_prompts_path(run, name)}" for name in measured)
    return f"{format_table(lines, header)}\n\n{paths}"
