"""Converts public data sets to our JSONL.

megatron-oreal prepare-data gsm8k --input train.jsonl --out prompts.jsonl
megatron-oreal prepare-data gsm8k --input train.jsonl --out sft.jsonl --sft
megatron-oreal prepare-data dapo --input dapo-math-17k.parquet --out dapo.jsonl --decontaminate math500.jsonl
megatron-oreal prepare-data fields --input my.csv --question problem --answer final.value --out prompts.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from megatron_oreal.data.cleaning import CleaningSettings, clean, summarize
from megatron_oreal.data.examples import write_examples
from megatron_oreal.data.files import write_jsonl
from megatron_oreal.data.importers import FIELDS, FORMATS, get_example_format, get_format, import_rows, import_solutions
from megatron_oreal.data.importing import DataFormat, Imported
from megatron_oreal.data.sources import RawData, open_source
from megatron_oreal.data.training_sets import Columns
from megatron_oreal.observability.files import write_atomically

FILE = click.Path(dir_okay=False, path_type=Path)
COLUMN_OPTIONS = {"question": "--question", "answer": "--answer", "pass_rate": "--pass-rate", "tags": "--tags"}
EPILOG = f"""\b
FORMAT is one of:
  {", ".join(list(FORMATS)[:7])},
  {", ".join(list(FORMATS)[7:])},
  {FIELDS} (any columns, by --question and --answer).

Parquet files need `pip install pyarrow`, hub names `pip install datasets`, near duplicates `pip install datasketch`;
`pip install -e ".[data]"` in the checkout installs the three."""


@click.command(epilog=EPILOG)
@click.argument("format_name", metavar="FORMAT", type=click.Choice([*FORMATS, FIELDS]))
@click.option("--input", "sources", required=True, multiple=True, help="A file, a folder or a hub name; repeatable.")
@click.option("--out", required=True, type=FILE, help="The JSONL file to write.")
@click.option("--limit", type=click.IntRange(min=1), help="Take the first rows only.")
@click.option("--split", default="train", show_default=True, help="Of a hub data set.")
@click.option("--config", "hub_config", help="The configuration of a hub data set that has several.")
@click.option("--sft", is_flag=True, help="Write examples (prompt, response) from the solutions instead of prompts.")
@click.option("--question", help="For fields: the column of the question; a.b leads into nested values.")
@click.option("--answer", help="For fields: the column of the answer.")
@click.option("--pass-rate", help="For fields: the column of the pass rate.")
@click.option("--tags", help="For fields: the column of a tag or a list of tags.")
@click.option(
    "--skip-bad", default=0, show_default=True, type=click.IntRange(min=0), help="Skip up to so many bad rows."
)
@click.option(
    "--duplicates",
    type=click.Choice(["keep", "exact", "near"]),
    help="What to remove. By default near for math, dapo, deepscaler, big_math and fields; the others are kept whole.",
)
@click.option(
    "--near-threshold", type=click.FloatRange(0, 1, min_open=True), help="Similarity of near duplicates [0.8]."
)
@click.option("--decontaminate", multiple=True, type=FILE, help="A prompts file not to train on; repeatable.")
@click.option("--ngram", type=click.IntRange(min=2), help="Words in a row that a contaminated question shares [13].")
@click.option("--max-characters", type=click.IntRange(min=1), help="Remove longer questions.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Remove longer questions; needs --tokenizer.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A directory with tokenizer.json.")
@click.option("--drop-images", is_flag=True, help="Remove questions that link to an image; they are counted anyway.")
@click.option("--summary", type=FILE, help="Write what was found as JSON.")
def main(format_name: str, sources: tuple[str, ...], out: Path, sft: bool, **options: Any) -> None:
    """Converts a data set in FORMAT to JSONL of prompts, or of supervised examples, and says what it left out."""
    try:
        check_outputs(out, options["summary"], sources)
        text = (prepare_examples if sft else prepare_prompts)(format_name, sources, out, options)
    except (ValueError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    click.echo(text)


def check_outputs(out: Path, summary: Path | None, sources: tuple[str, ...]) -> None:
    """Raises an error if two outputs, or an output and an input, are one file."""
    if summary is not None and summary.resolve() == out.resolve():
        raise ValueError(f"--summary: {summary} is the file of --out; give it another name")
    for source in sources:
        if out.resolve() == Path(source).expanduser().resolve():
            raise ValueError(f"--out: {out} is the file of --input; give it another name")


def prepare_prompts(format_name: str, sources: tuple[str, ...], out: Path, options: dict[str, Any]) -> str:
    data_format = choose_format(format_name, options)
    settings = cleaning_settings(data_format, options)
    data = open_sources(data_format, sources, options)
    imported = import_rows(data_format, format_name, data, options["limit"], options["skip_bad"])
    kept, findings = clean(imported.items, settings)
    if not kept:
        raise ValueError(f"--out: nothing is left of {len(imported.items)} prompts; loosen the filters")
    summary = import_summary(imported, format_name, sources) | summarize(findings, settings) | {"written": len(kept)}
    write_jsonl(out, kept)
    if options["summary"] is not None:
        options["summary"].parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options["summary"], json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    return "\n".join([*describe(summary), f"{out}: {len(kept)} prompts"])


def prepare_examples(format_name: str, sources: tuple[str, ...], out: Path, options: dict[str, Any]) -> str:
    refuse(options, ("limit", "split", "skip_bad", "hub_config"), "works on prompts: drop it, or drop --sft")
    data_format = get_example_format(format_name)
    data = open_sources(data_format, sources, options)
    imported = import_solutions(data_format, format_name, data, options["limit"], options["skip_bad"])
    skipped = f" ({len(imported.bad)} bad rows skipped)" if imported.bad else ""
    return f"{out}: {write_examples(out, imported.items)} examples{skipped}"


def open_sources(data_format: DataFormat, sources: tuple[str, ...], options: dict[str, Any]) -> list[RawData]:
    hub_config = options["hub_config"] or data_format.hub_config
    return [found for source in sources for found in open_source(source, options["split"], hub_config)]


def choose_format(format_name: str, options: dict[str, Any]) -> DataFormat:
    if format_name != FIELDS:
        refuse(options, [name for name in options if name not in COLUMN_OPTIONS], f"is for {FIELDS}: drop it")
        return get_format(format_name)
    for name in ("question", "answer"):
        if not options[name]:
            raise ValueError(f"--{name} names the column of the {name}: give it for {FIELDS}")
    return DataFormat(Columns(**{name: options[name] for name in COLUMN_OPTIONS}).to_row, duplicates="near")


def refuse(options: dict[str, Any], allowed: Any, reason: str) -> None:
    """Raises ValueError that names an option which is given and has no effect here."""
    for name, value in options.items():
        if name not in allowed and value not in (None, False, ()):
            raise ValueError(f"--{name.replace('_', '-')} {reason}")


def cleaning_settings(data_format: DataFormat, options: dict[str, Any]) -> CleaningSettings:
    duplicates = options["duplicates"] or data_format.duplicates
    if options["near_threshold"] is not None and duplicates != "near":
        raise ValueError("--near-threshold has an effect with --duplicates near alone: drop it, or add that")
    if options["ngram"] is not None and not options["decontaminate"]:
        raise ValueError("--ngram has an effect with --decontaminate alone: drop it, or add that")
    if options["tokenizer"] is not None and options["max_tokens"] is None:
        raise ValueError("--tokenizer counts tokens for --max-tokens: give that too, or drop it")
    names = ("near_threshold", "ngram", "max_characters", "max_tokens", "tokenizer", "drop_images")
    given = {name: options[name] for name in names if options[name] is not None}
    return CleaningSettings(duplicates=duplicates, evaluation_sets=options["decontaminate"], **given)


def import_summary(imported: Imported[Any], format_name: str, sources: tuple[str, ...]) -> dict[str, Any]:
    return {
        "format": format_name,
        "inputs": list(sources),
        "rows": imported.num_rows + imported.num_repeats,
        "repeats": {"count": imported.num_repeats, "removed": True},
        "bad_rows": {
            "count": len(imported.bad),
            "removed": True,
            "rows": [{"input": bad.origin, "place": bad.place, "reason": bad.reason} for bad in imported.bad],
        },
    }


LINES = {
    "repeats": "repeats of one published row",
    "bad_rows": "bad rows",
    "too_long": "questions too long",
    "image_links": "questions that link to an image",
    "contaminated": "questions of an evaluation set",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "conflicting_answers": "rows whose question has several answers",
    "similar_with_other_answers": "similar questions with other answers",
}


def describe(summary: dict[str, Any]) -> list[str]:
    """Returns one line about the rows and one for each kind of finding that occurs."""
    lines = [f"{summary['rows']:>9} rows of {', '.join(summary['inputs'])}"]
    for key, words in LINES.items():
        found = summary[key]
        if found["count"]:
            lines.append(f"{found['count']:>9} {words}: {'removed' if found['removed'] else 'kept'}{example(found)}")
    return lines


def example(found: dict[str, Any]) -> str:
    """Returns the first case in brackets, as an example."""
    if found.get("pairs"):
        return f" (the first: {found['pairs'][0][0]} is like {found['pairs'][0][1]})"
    if found.get("groups"):
        answers = ", ".join(f"{answered['id']}: {answered['answer'][:40]}" for answered in found["groups"][0][:3])
        return f" (the first: {answers})"
    if found.get("rows"):
        first = found["rows"][0]
        return f" (the first: {first['input']} {first['place']}: {first['reason']})"
    return ""


if __name__ == "__main__":
    main()
