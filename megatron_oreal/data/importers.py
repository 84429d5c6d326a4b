"""Converts public data sets from their own formats to our prompts and examples.

gsm8k: openai/grade-school-math, rows {"question", "answer"}; the answer has <<calculator>> marks and ends in "#### N".
orz: Open-Reasoner-Zero, evaluation rows {"prompt": [{"from", "value"}], "final_answer"} and training rows
[{"from", "value"}, {"ground_truth": {"value"}}], or {"0", "1"} of these two, as the hub's tables hold them.
oreal: OREAL-RL-Prompts, rows {"question", "gold_answer", "pass_rate"}.
math, dapo, deepscaler, big_math, and fields for any columns: data/training_sets.py.
Benchmarks, in their own formats (data/benchmarks.py) and in that of Open-Reasoner-Zero's evaluation rows: math500,
aime24, aime25, olympiadbench, livemathbench, gpqa, mmlu_pro.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
from megatron_oreal.data.files import Row
from megatron_oreal.data.importing import DataFormat, Imported, read_rows, refuse_bad
from megatron_oreal.data.prompts import parse_prompt, parse_text, prompt_row
from megatron_oreal.data.sources import ForeignRow, RawData, open_source
from megatron_oreal.data.training_sets import (
    big_math_row,
    dapo_repeat_key,
    dapo_row,
    deepscaler_row,
    math_example,
    require_object,
    solved_math_row,
)
from megatron_oreal.rewards.references import check_reference
from megatron_oreal.types import Message, Prompt

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)")
SURROGATE = re.compile("[\ud800-\udfff]")
ORZ_ROLES = {"user": "user", "human": "user", "system": "system", "assistant": "assistant", "gpt": "assistant"}


def gsm8k_row(row: Any) -> Row:
    _, answer = split_gsm8k_answer(row)
    return {"prompt": parse_text(row, "question"), "answer": answer}


def gsm8k_example(row: Any) -> Example:
    r"""Removes the calculator marks from the solution and turns its last line "#### N" into "\boxed{N}"."""
    solution, answer = split_gsm8k_answer(row)
    response = CALCULATOR_MARK.sub("", solution) + f"\\boxed{{{answer}}}"
    return Example((Message("user", parse_text(row, "question")),), response)


def split_gsm8k_answer(row: Any) -> tuple[str, str]:
    """Returns the solution before "####", and the number after it without thousands separators."""
    solution, mark, answer = parse_text(require_object(row), "answer").rpartition("####")
    number = answer.strip().replace(",", "").lstrip("$")
    if not mark or not NUMBER.fullmatch(number):
        raise ValueError("answer must end with '#### ' and a number")
    return solution, number


def orz_row(row: Any) -> Row:
    turns: Any
    if isinstance(row, dict) and {"0", "1"} <= row.keys():
        row = [row["0"], row["1"]]
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
    """Makes a format that reads the benchmark's own rows and Open-Reasoner-Zero's evaluation rows."""

    def to_row(row: Any) -> Row:
        foreign = require_object(row)
        return orz_row(foreign) if isinstance(foreign.get("prompt"), list) else parse(foreign)

    return to_row


FORMATS: dict[str, DataFormat] = {
    "gsm8k": DataFormat(gsm8k_row, gsm8k_example, hub_config="main"),
    "orz": DataFormat(orz_row),
    "oreal": DataFormat(oreal_row),
    "math": DataFormat(solved_math_row, math_example, duplicates="near"),
    "dapo": DataFormat(dapo_row, duplicates="near", repeat_key=dapo_repeat_key),
    "deepscaler": DataFormat(deepscaler_row, duplicates="near"),
    "big_math": DataFormat(big_math_row, duplicates="near"),
    "math500": DataFormat(benchmark(math_row)),
    "aime24": DataFormat(benchmark(aime_row)),
    "aime25": DataFormat(benchmark(aime_row)),
    "olympiadbench": DataFormat(benchmark(olympiadbench_row), hub_config="OE_TO_maths_en_COMP"),
    "livemathbench": DataFormat(benchmark(livemathbench_row), hub_config="v202412_AMC_en"),
    "gpqa": DataFormat(benchmark(gpqa_row), hub_config="gpqa_diamond"),
    "mmlu_pro": DataFormat(benchmark(mmlu_pro_row)),
}


FIELDS = "fields"  # the format of any table, made from the columns that the user names


def import_prompts(format_name: str, source: str, split: str = "train", limit: int | None = None) -> list[Prompt]:
    """Reads a file (.json: a list; .csv; .parquet; else JSONL), a folder of these or a hub data set.

    `limit` keeps the first rows. Raises ValueError for an unknown format, an unreadable source and a row that does not
    fit, with its index; and for reference answers that no response can be judged by, with their number and the first.
    """
    data_format = get_format(format_name)
    sources = open_source(source, split, data_format.hub_config)
    return [parse_prompt(row) for row in import_rows(data_format, format_name, sources, limit).items]


def import_rows(
    data_format: DataFormat, format_name: str, sources: Sequence[RawData], limit: int | None = None, skip_bad: int = 0
) -> Imported[Row]:
    """Returns rows of a prompts file: {"id", "prompt", "answer", "source", "pass_rate"} and, if there are any, "tags".

    Up to `skip_bad` rows that do not fit, or whose answers cannot be judged, are skipped. Raises ValueError that names
    them when there are more.
    """

    def convert(name: str, row: ForeignRow) -> Row:
        found = data_format.to_row(row.value)
        prompt = parse_prompt(found | {"id": f"{name}-{row.index}", "source": name})
        if any(SURROGATE.search(text) for text in (prompt.answer, *(message.content for message in prompt.messages))):
            raise ValueError("a text holds half of a surrogate pair, which no file can hold; correct the text")
        return prompt_row(prompt) | ({"tags": found["tags"]} if found.get("tags") else {})

    def check(row: Row) -> None:
        check_reference(row["answer"])

    imported = read_rows(sources, convert, check, data_format.repeat_key, limit)
    refuse_bad(imported, format_name, skip_bad)
    return imported


def import_examples(format_name: str, source: str, split: str = "train", limit: int | None = None) -> list[Example]:
    """Reads a format's solutions as examples. Raises ValueError as `import_prompts` does."""
    data_format = get_example_format(format_name)
    sources = open_source(source, split, data_format.hub_config)
    return import_solutions(data_format, format_name, sources, limit).items


def import_solutions(
    data_format: DataFormat, format_name: str, sources: Sequence[RawData], limit: int | None = None, skip_bad: int = 0
) -> Imported[Example]:
    """Returns examples. Up to `skip_bad` rows that do not fit are skipped; more raise ValueError that names them."""
    to_example = data_format.to_example
    assert to_example is not None
    imported = read_rows(sources, lambda _, row: to_example(row.value), lambda _: None, data_format.repeat_key, limit)
    refuse_bad(imported, format_name, skip_bad)
    return imported


def get_example_format(name: str) -> DataFormat:
    """Returns the format of this name. Raises ValueError if its rows hold no solutions."""
    data_format = FORMATS.get(name) if name == FIELDS else get_format(name)
    if data_format is None or data_format.to_example is None:
        known = ", ".join(known for known, candidate in FORMATS.items() if candidate.to_example)
        raise ValueError(f"--sft: {name} holds answers without solutions; formats with solutions: {known}")
    return data_format


def get_format(name: str) -> DataFormat:
    if name not in FORMATS:
        raise ValueError(f"FORMAT {name!r} is not known; known: {', '.join(FORMATS)}")
    return FORMATS[name]
