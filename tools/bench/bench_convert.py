"""Measures speed and memory of tools/convert.py, beside a plain copy of the same bytes in the same run.

    python tools/bench/bench_convert.py --rounds 3 --workers 2

The benchmark converts a random checkpoint of Qwen2.5-1.5B's shapes (2.9 GiB in bfloat16) to torch_dist and back.
Conversions and copies alternate; both wait until their files are on disk, and each ratio is within one round. Both
begin just after the other's output was removed, because returning memory to the machine can take longer than writing.
The conversions' seconds exclude the imports. A separate run measures the seconds of the whole command and its anonymous
memory (of all processes, without file caches and shared memory).
Then bench_mbridge.py runs on the same files, if mbridge is installed. The benchmark does not measure Megatron-Bridge,
which cannot be imported without Transformer Engine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

from megatron_oreal.conversion.conversion import ConversionOptions, exported, hf_to_megatron, megatron_to_hf
from megatron_oreal.conversion.safetensors_files import create_files, fill
from megatron_oreal.weights.families import read_architecture

QWEN2_1_5B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
FILE_BYTES = 2**30
CONVERT = Path(__file__).parents[1] / "convert.py"


def make_checkpoint(path: Path, num_layers: int) -> int:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(QWEN2_1_5B | {"num_hidden_layers": num_layers}))
    rows = exported(read_architecture(path), "lm")
    planned = [
        (name, shape, torch.bfloat16)
        for row, place in rows
        for name, shape in zip(row.hf_names(place), row.hf_shapes(), strict=True)
    ]
    slots = create_files(path, planned, FILE_BYTES)
    noise = torch.randint(-(2**15), 2**15, (2**26,), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    for number, (name, shape, dtype) in enumerate(planned):
        num_elements = torch.Size(shape).numel()
        repeated = noise.roll(number)[:num_elements] if num_elements <= len(noise) else noise.repeat(4)[:num_elements]
        fill(path, slots[name], repeated.view(dtype).reshape(shape))
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def plain_copy(source: Path, out: Path) -> None:
    out.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as copied:
            os.fsync(copied.fileno())


def timed(action: Callable[[], object], out: Path) -> float:
    """Returns the seconds of a call, and removes `out`, which the call makes."""
    begin = time.monotonic()
    action()
    seconds = time.monotonic() - begin
    shutil.rmtree(out)
    return seconds


def run_command(*arguments: str | Path) -> tuple[float, float]:
    """Returns (seconds of the whole command, peak GiB of anonymous memory)."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, CONVERT, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = [0]
    watcher = threading.Thread(target=watch_memory, args=(process, peak))
    watcher.start()
    _, errors = process.communicate()
    watcher.join()
    if process.returncode:
        raise click.ClickException(errors.decode())
    return time.monotonic() - begin, peak[0] / 2**20


def watch_memory(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            processes = [str(process.pid), *children.read_text().split()]
        except OSError:
            processes = [str(process.pid)]
        peak[0] = max(peak[0], sum(map(anonymous_kibibytes, processes)))
        time.sleep(0.02)


def anonymous_kibibytes(process: str) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def run_rival(hf: Path, rounds: int) -> None:
    """Runs mbridge on the same files; reports a failure of mbridge without failing itself."""
    command = [sys.executable, Path(__file__).with_name("bench_mbridge.py"), hf, "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        click.echo(f"mbridge: not measured, it failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    else:
        click.echo(done.stdout.rstrip())


@click.command()
@click.option("--rounds", default=3)
@click.option("--workers", default=2)
@click.option("--layers", default=28, help="Fewer make a smaller checkpoint.")
@click.option("--folder", type=click.Path(path_type=Path), help="On the disk to measure; default: the temporary one.")
def main(rounds: int, workers: int, layers: int, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        num_bytes = make_checkpoint(root / "hf", layers)
        click.echo(f"{num_bytes / 2**30:.2f} GiB, {workers} workers, torch {torch.__version__}")
        hf, mcore, out = root / "hf", root / "mcore", root / "out"
        hf_to_megatron(hf, mcore, ConversionOptions(num_workers=workers))
        kinds: dict[str, tuple[list[str | Path], Callable[[ConversionOptions], object]]] = {
            "hf2mcore": (["--hf", hf], lambda options: hf_to_megatron(hf, out, options)),
            "mcore2hf": (["--mcore", mcore], lambda options: megatron_to_hf(mcore, out, options)),
        }
        for kind, (arguments, convert) in kinds.items():
            whole, gib = run_command(kind, *arguments, "--out", out, "--workers", str(workers))
            shutil.rmtree(out)
            click.echo(f"{kind}: {whole:.2f} s with its imports and the comparison, {gib:.2f} GiB of anonymous memory")
            for verify in (False, True):
                options = ConversionOptions(num_workers=workers, verify=verify)
                actions = [partial(plain_copy, hf, out), partial(convert, options)]
                ratios = []
                for round_number in range(rounds):
                    # The first of a pair runs in the state that the previous pair left, so the order alternates.
                    order = [0, 1] if round_number % 2 == 0 else [1, 0]
                    seconds = {number: timed(actions[number], out) for number in order}
                    ratios.append(seconds[0] / seconds[1])
                    click.echo(
                        f"  round {round_number}: copy {seconds[0]:.2f} s, {seconds[1]:.2f} s, "
                        f"{num_bytes / 2**30 / seconds[1]:.2f} GiB/s, {ratios[-1]:.0%} of the copy"
                    )
                named = f"{kind} {'--verify' if verify else '--no-verify'}"
                click.echo(f"{named}: median {statistics.median(ratios):.0%} of a plain copy")
        shutil.rmtree(mcore)
        run_rival(hf, rounds)


if __name__ == "__main__":
    main()
