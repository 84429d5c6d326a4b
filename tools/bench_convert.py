"""Speed and memory of tools/convert.py, beside a plain copy of the same bytes in the same run.

    python tools/bench_convert.py --rounds 3 --workers 2

A random checkpoint of Qwen2.5-1.5B's shapes (2.9 GiB in bfloat16) is copied, converted to torch_dist and back, taking
turns, so that a busy machine slows all of them; each also waits until its files are on disk. Ratios are to the
copy of the same round. Memory is anonymous (what is neither a file's cache nor shared), of all processes together.
Then bench_mbridge.py runs on the same files, where mbridge is installed. Megatron-Bridge is not measured: it cannot be
imported without Transformer Engine.
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
from pathlib import Path

import click
import torch

from megatron_oreal.checkpoint.conversion import exported
from megatron_oreal.checkpoint.families import read_architecture
from megatron_oreal.checkpoint.safetensors_files import create_files, fill

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
CONVERT = Path(__file__).with_name("convert.py")


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


def plain_copy(source: Path, out: Path) -> float:
    begin = time.monotonic()
    out.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as copied:
            os.fsync(copied.fileno())
    return time.monotonic() - begin


def convert(*arguments: str | Path) -> tuple[float, float, float]:
    """(the conversion's own seconds, those of the whole command, peak GiB of anonymous memory)"""
    begin = time.monotonic()
    command = [sys.executable, CONVERT, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0]
    watcher = threading.Thread(target=watch_memory, args=(process, peak))
    watcher.start()
    output, errors = process.communicate()
    watcher.join()
    if process.returncode:
        raise click.ClickException(errors)
    found = re.search(r"GiB in ([\d.]+) s", output)
    assert found is not None
    return float(found[1]), time.monotonic() - begin, peak[0] / 2**20


def watch_memory(process: subprocess.Popen[str], peak: list[int]) -> None:
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
    """mbridge on the same files; its failure is told, and is not ours."""
    command = [sys.executable, CONVERT.with_name("bench_mbridge.py"), hf, "--rounds", str(rounds)]
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
        kinds: dict[str, list[str | Path]] = {
            "hf2mcore": ["hf2mcore", "--hf", root / "hf"],
            "mcore2hf": ["mcore2hf", "--mcore", root / "mcore"],
        }
        convert(*kinds["hf2mcore"], "--out", root / "mcore", "--no-verify", "--workers", str(workers))
        ratios: dict[str, list[float]] = {}
        for round_number in range(rounds):
            copy_seconds = plain_copy(root / "hf", root / "copy")
            shutil.rmtree(root / "copy")
            rate = num_bytes / 2**30 / copy_seconds
            click.echo(f"round {round_number}: plain copy {copy_seconds:.2f} s, {rate:.2f} GiB/s")
            for kind, arguments in kinds.items():
                for verify in ("--no-verify", "--verify"):
                    out = root / "out"
                    seconds, whole, gib = convert(*arguments, "--out", out, verify, "--workers", str(workers))
                    shutil.rmtree(out)
                    ratio = copy_seconds / seconds
                    ratios.setdefault(f"{kind} {verify}", []).append(ratio)
                    click.echo(
                        f"  {kind} {verify}: {seconds:.2f} s ({whole:.2f} s with its imports), "
                        f"{num_bytes / 2**30 / seconds:.2f} GiB/s, {ratio:.0%} of the copy, {gib:.2f} GiB anonymous"
                    )
        for kind, values in ratios.items():
            click.echo(f"{kind}: median {statistics.median(values):.0%} of a plain copy")
        shutil.rmtree(root / "mcore")
        run_rival(root / "hf", rounds)


if __name__ == "__main__":
    main()
