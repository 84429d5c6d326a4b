"""Measures loading a Hugging Face directory into a live model and saving it, beside mbridge in the same process.

    python tools/bench/bench_mbridge.py DIR --rounds 3        (bench_convert.py also runs it)

mbridge (`pip install --no-deps mbridge`) only moves weights between files and live models, so both rivals do that, in
one process without a GPU. mbridge builds its models with Transformer Engine; here it fills a module that has the
parameters of such a model under the same names. The rivals alternate; a write ends when its files are on disk.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from megatron_oreal.config import ParallelConfig
from megatron_oreal.models import parallel
from megatron_oreal.weights.families import Architecture, parameters, read_architecture
from megatron_oreal.weights.hf_directory import HfReader, save_hf
from megatron_oreal.weights.initial import load_parameters
from megatron_oreal.weights.stream import WeightStream
from megatron_oreal.weights.torch_dist import NORM_KEYS


def live_model(architecture: Architecture) -> nn.Module:
    """Builds empty parameters with the names that Transformer Engine's layers give them."""
    model = nn.Module()
    for row, place in parameters(architecture, "lm"):
        if not row.exported:
            continue
        *path, last = transformer_engine_name(row.megatron_name(place)).split(".")
        module = model
        for name in path:
            if name not in dict(module.named_children()):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        if place.layer is not None:
            model.get_submodule(f"decoder.layers.{place.layer}").layer_number = place.layer + 1
        module.register_parameter(last, nn.Parameter(torch.empty(row.shape, dtype=torch.bfloat16), requires_grad=False))
    layers = model.get_submodule("decoder.layers")
    model.get_submodule("decoder").layers = nn.ModuleList(layers.children())
    return model


def transformer_engine_name(name: str) -> str:
    for plain, fused in NORM_KEYS.items():
        name = name.replace(f".{plain}", f".{fused}")
    return name


def timed(work: Callable[[], object], folder: Path | None = None) -> float:
    """Returns the seconds of a call, until the files of `folder` are on disk."""
    begin = time.monotonic()
    work()
    for file in sorted(folder.glob("*.safetensors")) if folder else []:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    return time.monotonic() - begin


def measure(hf: Path, out: Path, rounds: int) -> None:
    rival: Any = importlib.import_module("mbridge").AutoBridge  # before parallel, because it needs an unchanged torch
    layout = parallel.initialize(ParallelConfig(), seed=0)
    architecture = read_architecture(hf)
    bridge, model = rival.from_pretrained(hf), live_model(architecture)
    named = list(model.named_parameters())
    stream = WeightStream(named, architecture, "lm", layout)
    num_bytes = sum(parameter.nbytes for _, parameter in named)
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "files -> live model": (
            lambda: load_parameters(named, hf, architecture, "lm", layout),
            lambda: bridge.load_weights([model], str(hf)),
        ),
        "live model -> files": (
            lambda: save_hf(stream, hf, hf, out / "ours", True),
            lambda: bridge.save_weights([model], str(out / "mbridge")),
        ),
    }
    for kind, (ours, theirs) in works.items():
        ratios = []
        for number in range(rounds + 1):  # the first round warms up
            own_seconds, rival_seconds = timed(ours, out / "ours"), timed(theirs, out / "mbridge")
            if number:
                ratios.append(rival_seconds / own_seconds)
                rates = [num_bytes / 2**30 / seconds for seconds in (own_seconds, rival_seconds)]
                click.echo(f"{kind}: ours {rates[0]:.2f} GiB/s, mbridge {rates[1]:.2f} GiB/s")
            if number < rounds:
                shutil.rmtree(out / "ours", ignore_errors=True)
                shutil.rmtree(out / "mbridge", ignore_errors=True)
        click.echo(f"{kind}: median {statistics.median(ratios):.2f} times mbridge's speed")
    assert_same(hf, out / "ours")
    assert_same(hf, out / "mbridge")
    click.echo("both wrote what they had read")
    parallel.finalize()


def assert_same(hf: Path, written: Path) -> None:
    one, other = HfReader(hf), HfReader(written)
    for name in one.file_of:
        assert torch.equal(one.read(name, None, 0, 1).view(torch.int16), other.read(name, None, 0, 1).view(torch.int16))


@click.command()
@click.argument("hf", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=3)
def main(hf: Path, rounds: int) -> None:
    if importlib.util.find_spec("mbridge") is None:
        click.echo("mbridge: not measured, it is not installed (pip install --no-deps mbridge)")
        sys.exit(0)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(dir=hf.parent) as name:
        measure(hf, Path(name), rounds)


if __name__ == "__main__":
    main()
