"""Converts public data sets from their own formats to our prompts and examples.

gsm8k: openai/grade-school-math, rows {"question", "answer"}; the answer has <<calculator>> marks and ends in "#### N".
orz: Open-Reasoner-Zero, evaluation rows {"prompt": [{"from", "value"}], "final_answer"} and training rows
[{"from", "value"}, {"ground_truth": {"value"}}].
oreal: OREAL-RL-Prompts, rows {"question", "gold_answer", "pass_rate"}.
Benchmarks, in their own formats (data/benchmarks.py) and in that of Open-Reasoner-Zero's evaluation rows: math500,
aime24, aime25, olympiadbench, livemathbench, gpqa, mmlu_pro.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_oreal.data.benchmarks import (
    aime_row,
    gpqa_row,
    livemathbench_row,
    math_row,
    mmlu_pro_row,
    olympiadbench_row,
)
from megatron_oreal.data.examples import Example
from megatron_oreal.data.files import Row, read_jsonl
from megatron_oreal.data.prompts import parse_prompt, parse_text
from megatron_oreal.rewards.references import check_reference
from megatron_oreal.types import Message, Prompt

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)")
ORZ_ROLES = {"user": "user", "human": "user", "system": "system", "assistant": "assistant", "gpt": "assistant"}


@dataclass(slots=True, frozen=True)
class DataFormat:
    """Says how the rows of one public data set are converted; README.md shows how to add one."""

    to_row: Callable[[Any], Row]  # a foreign row -> {"prompt", "answer"} and perhaps "pass_rate"
    to_example: Callable[[Any], Example] | None = None  # where the rows hold solutions
    hub_config: str | None = None  # the configuration that the hub's data set of this format has to be given


@dataclass(slots=True, frozen=True)
class RawData:
    """Foreign rows; `name` becomes the prompts' source and the start of their ids."""

    name: str
    rows: list[Any]


def gsm8k_row(row: Any) -> Row:
    _, answer = split_gsm8k_answer(row)
    return {"prompt": parse_text(row, "question"), "answer": answer}


def gsm8k_example(row: Any) -> Example:
    r"""The solution without calculator marks, its last line "#### N" as "\boxed{N}"."""
    solution, answer = split_gsm8k_answer(row)
    response = CALCULATOR_MARK.sub("", solution) + f"\\boxed{{{answer}}}"
    return Example((Message("user", parse_text(row, "question")),), response)


def split_gsm8k_answer(row: Any) -> tuple[str, str]:
    """The solution up to "####", and the number after it without thousands separators."""
    solution, mark, answer = parse_text(require_object(row), "answer").rpartition("####")
    number = answer.strip().replace(",", "").lstrip("$")
    if not mark or not NUMBER.fullmatch(number):
        raise ValueError("answer must end with '#### ' and a number")
    return solution, number


def orz_row(row: Any) -> Row:
    turns: Any
    if isinstance(row, list):
        solution = require_object(row[-1] if row else None)
        turns, answer = row[:-1], require_object(solution.get("ground_truth")).get("value")
    else:
        turns, answer = require_object(row).get("prompt"), row.get("final_answer")
    if not isinstance(turns, list) or not turns:
        raise ValueError('prompt must be a list of {"from", "value"}')
    messages = []
    for turn in map(require_object, turns):
        if turn.get("from") not in ORZ_ROLES:
            raise ValueError(f"from must be one of {', '.join(ORZ_ROLES)}, got {turn.get('from')!r}")
        messages.append({"role": ORZ_ROLES[turn["from"]], "content": turn.get("value")})
    return {"prompt": messages, "answer": answer}


def oreal_row(row: Any) -> Row:
    return {
        "prompt": parse_text(require_object(row), "question"),
        "answer": parse_text(row, "gold_answer"),
        "pass_rate": row.get("pass_rate"),
    }


def benchmark(parse: Callable[[Row], Row]) -> Callable[[Any], Row]:
    """Takes rows of the benchmark itself, and Open-Reasoner-Zero's evaluation rows."""

    def to_row(row: Any) -> Row:
        foreign = require_object(row)
        return orz_row(foreign) if isinstance(foreign.get("prompt"), list) else parse(foreign)

    return to_row


def require_object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError("the row is not of this format; choose the FORMAT that fits the file")
    return value


FORMATS: dict[str, DataFormat] = {
    "gsm8k": DataFormat(gsm8k_row, gsm8k_example, hub_config="main"),
    "orz": DataFormat(orz_row),
    "oreal": DataFormat(oreal_row),
    "math500": DataFormat(benchmark(math_row)),
    "aime24": DataFormat(benchmark(aime_row)),
    "aime25": DataFormat(benchmark(aime_row)),
    "olympiadbench": DataFormat(benchmark(olympiadbench_row), hub_config="OE_TO_maths_en_COMP"),
    "livemathbench": DataFormat(benchmark(livemathbench_row), hub_config="v202412_AMC_en"),
    "gpqa": DataFormat(benchmark(gpqa_row), hub_config="gpqa_diamond"),
    "mmlu_pro": DataFormat(benchmark(mmlu_pro_row)),
}


def import_prompts(format_name: str, source: str, split: str = "train", limit: int | None = None) -> list[Prompt]:
    """Reads a file (.json: a list; .csv; else JSONL) or a hub data set; `limit` keeps the first rows.

    Raises ValueError for an unknown format, an unreadable source and a row that does not fit, with its index; and for
    reference answers that no response can be judged by, with their number and the first of them.
    """
    data_format = get_format(format_name)
    data = read_source(source, data_format, split)
    prompts = []
    refused: list[str] = []
    for index, row in enumerate(data.rows[:limit]):
        try:
            prompts.append(parse_prompt(data_format.to_row(row) | {"id": f"{data.name}-{index}", "source": data.name}))
        except ValueError as error:
            raise ValueError(f"--input: {source} row {index} is not {format_name}: {error}") from None
        try:
            check_reference(prompts[-1].answer)
        except ValueError as error:
            refused.append(f"row {index}: {error}")
    if refused:
        raise ValueError(
            f"--input: {source}: {len(refused)} of {len(prompts)} answers cannot be judged; the first is {refused[0]}"
        )
    return prompts


def import_examples(format_name: str, source: str, split: str = "train", limit: int | None = None) -> list[Example]:
    """Reads the solutions of a format that has them as examples. Raises ValueError as `import_prompts` does."""
    data_format = get_format(format_name)
    if data_format.to_example is None:
        known = ", ".join(name for name, candidate in FORMATS.items() if candidate.to_example)
        raise ValueError(f"--sft: {format_name} holds answers without solutions; formats with solutions: {known}")
    examples = []
    for index, row in enumerate(read_source(source, data_format, split).rows[:limit]):
        try:
            examples.append(data_format.to_example(row))
        except ValueError as error:
            raise ValueError(f"--input: {source} row {index} is not {format_name}: {error}") from None
    return examples


def get_format(name: str) -> DataFormat:
    if name not in FORMATS:
        raise ValueError(f"FORMAT {name!r} is not known; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def read_source(source: str, data_format: DataFormat, split: str) -> RawData:
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".json", ".jsonl", ".csv") or path.exists():
            raise ValueError(f"--input: {source} is not a file; give a file or the name of a hub data set")
        return read_hub(source, data_format, split)
    if path.suffix == ".csv":
        return RawData(path.stem, read_csv(path))
    if path.suffix != ".json":
        return RawData(path.stem, [row for _, row in read_jsonl(path, "--input")])
    try:
        rows = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--input: {source} is not JSON ({error}); fix the file") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"--input: {source} must hold a non-empty list of rows")
    return RawData(path.stem, rows)


def read_csv(path: Path) -> list[Row]:
    """The rows under a header line, as strings."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--input: {path} is not CSV in UTF-8 ({error}); fix the file") from None
    if not rows:
        raise ValueError(f"--input: {path} has no row under its header")
    return rows


def read_hub(name: str, data_format: DataFormat, split: str) -> RawData:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"--input: {name} is not a file, and reading a hub data set needs a package: pip install datasets"
        ) from None
    try:
        rows = list(load_dataset(name, data_format.hub_config, split=split))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--input: {name} split {split} cannot be read ({reason}); download it as a file") from None
    return RawData(f"{name.rpartition('/')[2]}-{split}", rows)
