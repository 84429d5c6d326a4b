"""Converts checkpoints from Hugging Face to Megatron and back, on a CPU.

    megatron-oreal convert hf2mcore --hf Qwen2.5-7B --out qwen-mcore     for any TP, PP and EP, and Megatron-LM --load
    megatron-oreal convert mcore2hf --mcore qwen-mcore --out qwen-hf
    megatron-oreal convert mcore2hf --mcore RUN_DIR/checkpoints/step_000100/policy --out policy-hf
    megatron-oreal convert verify --hf Qwen2.5-7B --mcore qwen-mcore
    megatron-oreal convert inspect qwen-mcore

Output appears whole or not at all, and is compared with the input bit by bit before it does.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from megatron_oreal.conversion import conversion
from megatron_oreal.conversion.conversion import ConversionOptions, ConversionReport
from megatron_oreal.conversion.processes import available_cores
from megatron_oreal.launch import fail, one_line_errors
from megatron_oreal.weights.families import HeadKind, parameters, read_architecture
from megatron_oreal.weights.torch_dist_reader import is_torch_dist

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADS: dict[str | None, HeadKind | None] = {None: None, "lm": "lm", "reward": "scalar", "value": "scalar"}

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--head", type=click.Choice(["lm", "reward", "value"]), help="What ends it; else declared."),
        click.option("--workers", type=click.IntRange(min=1), help="Processes; default: one a core, at most 8."),
    ):
        command = option(command)
    return command


def writing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the output; as the input has it by default."),
        click.option("--verify/--no-verify", default=True, help="Compare the output with the input, bit by bit."),
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Must not exist."),
    ):
        command = option(command)
    return common_options(command)


@click.group()
def cli() -> None:
    """Checkpoints from Hugging Face to Megatron and back, on a CPU."""


@cli.command()
@click.option("--hf", type=FOLDER, required=True, help="config.json and safetensors.")
@click.option("--pad-vocab-to", type=click.IntRange(min=1), help="Rows of the embedding; default: a multiple of 128.")
@writing_options
def hf2mcore(
    hf: Path,
    out: Path,
    pad_vocab_to: int | None,
    head: str | None,
    dtype: str | None,
    workers: int | None,
    verify: bool,
) -> None:
    """Hugging Face -> torch_dist, which every parallel layout loads."""
    options = ConversionOptions(DTYPES[dtype] if dtype else None, num_workers(workers), verify)
    told(lambda: conversion.hf_to_megatron(hf, out, options, HEADS[head], pad_vocab_to), f"{out}")


@cli.command()
@click.option("--mcore", type=FOLDER, required=True, help="A torch_dist checkpoint, or step_<n>/<model> of a run.")
@click.option("--hf", type=FOLDER, help="Where config.json and the tokenizer come from, if not from the checkpoint.")
@click.option("--fp8-blocks", is_flag=True, help="Linears in float8 blocks of 128 x 128, as SGLang and vLLM read them.")
@writing_options
def mcore2hf(
    mcore: Path,
    hf: Path | None,
    out: Path,
    head: str | None,
    dtype: str | None,
    workers: int | None,
    verify: bool,
    fp8_blocks: bool,
) -> None:
    """torch_dist, or a model of the trainer's own checkpoints, -> Hugging Face."""
    options = ConversionOptions(DTYPES[dtype] if dtype else None, num_workers(workers), verify, fp8_blocks)
    told(lambda: conversion.megatron_to_hf(mcore, out, options, hf, HEADS[head]), f"{out}")


@cli.command()
@click.option("--hf", type=FOLDER, required=True)
@click.option("--mcore", type=FOLDER, required=True)
@common_options
def verify(hf: Path, mcore: Path, head: str | None, workers: int | None) -> None:
    """Compares two checkpoints bit by bit."""
    told(lambda: conversion.verify(hf, mcore, num_workers(workers), HEADS[head]), "the same weights")


@cli.command()
@click.argument("path", type=FOLDER)
@click.option("--hf", type=FOLDER, help="Where config.json comes from, if not from the checkpoint.")
def inspect(path: Path, hf: Path | None) -> None:
    """Prints what a checkpoint holds, after checking names and shapes."""
    is_hf = (path / "config.json").is_file() and not is_torch_dist(path)
    source = path if is_hf else hf or conversion.config_source(path)
    architecture = read_architecture(source)
    head = conversion.head_of_hf(path) if is_hf else conversion.head_of_megatron(path)
    rows = conversion.exported(architecture, head)
    if is_hf:
        dtypes = set(conversion.check_hf(path, rows, architecture, head).values())
    else:
        reader = conversion.open_megatron(path, architecture)
        reader.check(rows)
        dtypes = {reader.dtype(row, place) for row, place in rows}
    num_parameters = sum(torch.Size(row.shape).numel() for row, place in parameters(architecture, head) if row.exported)
    names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    click.echo(f"{path}: {'Hugging Face' if is_hf else 'Megatron'}, {architecture.family}, {head} head")
    click.echo(f"{num_parameters:,} parameters in {', '.join(names)}, {len(rows)} of Megatron's tensors")
    for name in architecture.__slots__:
        click.echo(f"  {name}: {getattr(architecture, name)}")


def told(convert: Callable[[], ConversionReport], what: str) -> None:
    begin = time.monotonic()
    report = convert()
    seconds = time.monotonic() - begin
    gib = report.num_bytes / 2**30
    click.echo(f"{what}: {report.num_tensors} tensors, {gib:.2f} GiB in {seconds:.1f} s ({gib / seconds:.2f} GiB/s)")


def num_workers(wanted: int | None) -> int:
    return wanted or min(8, available_cores())


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # the output's folder is cleared away
    try:
        with one_line_errors():
            cli(standalone_mode=False)
    except click.Abort:
        fail("interrupted; nothing was written", 130)


if __name__ == "__main__":
    main()
