"""Writes the samples of a run as one page of HTML that needs no other file and no network.

Text of a model may be hostile. The page holds it in JSON that cannot end its element, the page's script shows it only
as text, and the page's policy lets a browser run only that script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from megatron_oreal.observability.files import write_atomically
from megatron_oreal.reports.viewer.samples import ViewedRun, ViewedSample, finite
from megatron_oreal.reports.viewer.selection import worst_first

SCRIPTS = ("data.js", "tokens.js", "list.js", "detail.js", "app.js")  # in order of dependency
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
TOKEN_COLUMNS = ("logprobs", "differences", "weights", "advantages")


def write_page(path: Path, run: ViewedRun) -> int:
    """Writes the page with the samples of the run and returns its size in bytes.

    Raises ValueError if no page can be written to `path`.
    """
    check_out(path)
    page = render_page(run).encode("ascii")
    write_atomically(path, page)
    return len(page)


def check_out(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out: {path} does not end in .html: give the name of a page")
    if path.is_dir():
        raise ValueError(f"--out: {path} is a folder: give the name of a page in it")
    if not path.parent.is_dir():
        raise ValueError(f"--out: the folder {path.parent} does not exist: make it first")


def render_page(run: ViewedRun) -> str:
    script = "\n".join(read_part(name) for name in SCRIPTS)
    style = read_part("viewer.css")
    policy = f"default-src 'none'; script-src {source_hash(script)}; style-src {source_hash(style)}; base-uri 'none'"
    parts = {
        "policy": html.escape(policy),
        "title": as_ascii(html.escape(run.name)),
        "style": style,
        "samples": data_element("samples", sample_data(run)),
        "tokens": "\n".join(data_element(f"tokens-{step}", rows) for step, rows in token_data(run.samples).items()),
        "script": script,
    }
    # One pass replaces all placeholders, so that no text of the samples is read as one.
    return PLACEHOLDER.sub(lambda match: parts[match[1]], read_part("viewer.html"))


def read_part(name: str) -> str:
    return (files("megatron_oreal.reports.viewer") / "page" / name).read_text(encoding="ascii")


def source_hash(source: str) -> str:
    """Names an inline script or style by its content, as a content security policy does."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def as_ascii(text: str) -> str:
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def data_element(name: str, value: object) -> str:
    return f'<script type="application/json" id="{name}">{embedded_json(value)}</script>'


def embedded_json(value: object) -> str:
    """Returns JSON in ASCII without "<", so that it can neither end its element nor open a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def sample_data(run: ViewedRun) -> dict[str, object]:
    """Returns the samples in columns; writes a text that several samples share once."""
    prompts: dict[tuple[str, str, str], int] = {}
    rows = []
    for sample in run.samples:
        prompt = prompts.setdefault((sample.prompt_id, sample.prompt, sample.answer), len(prompts))
        rows.append(
            {
                "step": sample.step,
                "row": sample.row,
                "group": sample.group,
                "prompt": prompt,
                "source": sample.source,
                "response": sample.response,
                "status": sample.status,
                "extracted": sample.extracted,
                "reward": sample.reward,
                "tokens": sample.num_tokens,
                "logprob": sample.logprob,
                "finish": sample.finish_reason,
                "version": sample.policy_version,
                "rules": sample.rules,
                "judge": sample.judge,
                "disagrees": int(sample.judge_disagrees),
                "passRate": None if sample.pass_rate is None else round(sample.pass_rate, 4),
                "difference": None if sample.difference is None else float(f"{sample.difference:.4g}"),
                "recorded": int(sample.tokens is not None),
            }
        )
    names = list(rows[0]) if rows else []
    return {
        "run": run.name,
        "notes": list(run.notes),
        "prompts": [list(prompt) for prompt in prompts],
        "columns": {name: [row[name] for row in rows] for name in names},
        "worst": sorted(range(len(rows)), key=lambda index: worst_first(run.samples[index])),
    }


def token_data(samples: Sequence[ViewedSample]) -> dict[int, dict[int, dict[str, object]]]:
    """Returns, for each step, the tokens of its samples by their number on the page."""
    steps: dict[int, dict[int, dict[str, object]]] = {}
    for index, sample in enumerate(samples):
        if sample.tokens is not None:
            steps.setdefault(sample.step, {})[index] = token_columns(sample.tokens)
    return steps


def token_columns(record: Mapping[str, object]) -> dict[str, object]:
    columns: dict[str, object] = {"texts": record["texts"]}
    for name in TOKEN_COLUMNS:
        values = record.get(name)
        if isinstance(values, list):
            columns[name] = [finite(value) for value in values]
    return columns
