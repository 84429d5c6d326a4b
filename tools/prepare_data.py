"""Public data sets as our JSONL.

python tools/prepare_data.py gsm8k --input train.jsonl --out prompts.jsonl
python tools/prepare_data.py gsm8k --input train.jsonl --out sft.jsonl --sft
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from megatron_oreal.data.examples import write_examples
from megatron_oreal.data.importers import FORMATS, import_examples, import_prompts
from megatron_oreal.data.prompts import write_prompts


@click.command()
@click.argument("format_name", metavar="FORMAT", type=click.Choice(list(FORMATS)))
@click.option("--input", "source", required=True, help="A .json, .jsonl or .csv file, or a hub data set.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The JSONL file to write.")
@click.option("--limit", type=click.IntRange(min=1), help="Take the first rows only.")
@click.option("--split", default="train", show_default=True, help="Of a hub data set.")
@click.option("--sft", is_flag=True, help="Write examples (prompt, response) from the solutions instead of prompts.")
def main(format_name: str, source: str, out: Path, limit: int | None, split: str, sft: bool) -> None:
    """Converts a data set in FORMAT to JSONL of prompts, or of supervised examples."""
    try:
        if sft:
            num_rows = write_examples(out, import_examples(format_name, source, split, limit))
        else:
            num_rows = write_prompts(out, import_prompts(format_name, source, split, limit))
    except (ValueError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    click.echo(f"{out}: {num_rows} {'examples' if sft else 'prompts'}")


if __name__ == "__main__":
    main()
