"""Shows samples in a terminal: one row per sample, or each with its whole response."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from megatron_oreal.reports.curves import format_table
from megatron_oreal.reports.viewer.samples import ViewedSample

MIN_TEXT_WIDTH = 16
WIDEST_ANSWER = 20


def samples_table(samples: Sequence[ViewedSample], width: int) -> str:
    """Returns a table with a row for each sample, no wider than `width` if the columns of numbers leave room.

    The table has no column that is unknown for all samples.
    """
    columns: dict[str, list[object]] = {
        "step": [sample.step for sample in samples],
        "row": [sample.row for sample in samples],
        "status": [sample.status or None for sample in samples],
        "judge": [sample.judge for sample in samples],
        "reward": [sample.reward for sample in samples],
        "pass rate": [sample.pass_rate for sample in samples],
        "tokens": [sample.num_tokens for sample in samples],
        "log-prob": [sample.logprob for sample in samples],
        "|difference|": [sample.difference for sample in samples],
        "data set": [sample.source or None for sample in samples],
        "answer": [sample.answer for sample in samples],
        "found": [sample.extracted for sample in samples],
    }
    columns = {name: list(map(one_line_cell, cells)) for name, cells in columns.items() if any_known(cells)}
    left = width - sum(max(len(name), *(len(as_text(cell)) for cell in cells)) + 2 for name, cells in columns.items())
    text_width = max(MIN_TEXT_WIDTH, (left - 2) // 2)
    columns["prompt"] = [shortened(sample.prompt, text_width) for sample in samples]
    # The answer is at the end of a response.
    columns["response"] = [shortened(sample.response, text_width, keeps_end=True) for sample in samples]
    rows = list(zip(*columns.values(), strict=True))
    return format_table(rows, list(columns))


def any_known(cells: Sequence[object]) -> bool:
    return any(cell is not None for cell in cells)


def as_text(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def one_line_cell(cell: object) -> object:
    return shortened(cell, WIDEST_ANSWER) if isinstance(cell, str) else cell


def shortened(text: str, width: int, keeps_end: bool = False) -> str:
    """Returns the text in one line of at most `width` characters."""
    line = " ".join(printable(text[-4 * width :] if keeps_end else text[: 4 * width]).split())
    is_whole = len(text) <= 4 * width and len(line) <= width
    if is_whole:
        return line
    return "..." + line[-(width - 3) :] if keeps_end else line[: width - 3] + "..."


def printable(text: str) -> str:
    """Escapes control characters except the line feed, and marks that reorder text, which a terminal would obey."""
    return "".join(
        char if char == "\n" or unicodedata.category(char)[0] != "C" else char.encode("unicode_escape").decode()
        for char in text
    )


def whole_samples(samples: Sequence[ViewedSample], width: int) -> str:
    """Returns each sample with its prompt and its whole response."""
    return "\n\n".join(whole_sample(sample, width) for sample in samples)


def whole_sample(sample: ViewedSample, width: int) -> str:
    facts = [f"step {sample.step} row {sample.row}", sample.status or "no verdict", f"reward {as_text(sample.reward)}"]
    if sample.judge is not None:
        facts += [f"rules {sample.rules}", f"judge {sample.judge}"]
    facts += [f"{as_text(sample.num_tokens)} tokens", f"ended by {sample.finish_reason or '-'}"]
    facts += [f"answer {as_text(sample.answer)}", f"found {as_text(sample.extracted)}"]
    head = " | ".join(" ".join(printable(fact).split()) for fact in facts)
    return "\n".join(["=" * min(width, 100), head, "", printable(sample.prompt), "", printable(sample.response)])
