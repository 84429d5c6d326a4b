"""Installs Transformer Engine from a folder into a folder of its own, for the steps that use it.

The folder holds wheels (transformer_engine, nvdlfw_inspect), archives (*.tar.xz) that are unpacked as they are, among
them the library, and the source of transformer_engine_torch, which is compiled unless an archive holds it for this
Python. Where the folder is missing, the environment's own Transformer Engine is used, if there is one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

import click

from tools.gpu.findings import Recorder, reason_of, timed

CHECK = """
import torch, transformer_engine, transformer_engine.pytorch, transformer_engine_torch
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
print(transformer_engine.__version__ + (", Megatron-Core uses it" if HAVE_TE else ", but Megatron-Core does not"))
"""


def unpack(source: Path, site: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
        str(site),
    ]
    if wheels := sorted(map(str, source.glob("*.whl"))):
        timed([*pip, *wheels])
    for archive in sorted(source.glob("*.tar.xz")):
        with tarfile.open(archive) as file:
            file.extractall(site, filter="data")


def build(source: Path, site: Path) -> None:
    """Compiles transformer_engine_torch: about two minutes with 12 jobs."""
    os.environ.update({"MAX_JOBS": "12", "NVTE_FRAMEWORK": "pytorch", "NVTE_PYTORCH_FORCE_BUILD": "TRUE"})
    # Ninja compiles the files at once; without it on the path they are compiled one after the other.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # The headers of cuDNN and NCCL come with torch's own packages.
    include = Path(sysconfig.get_path("purelib")).glob("nvidia/*/include")
    os.environ["CPATH"] = ":".join(filter(None, [*map(str, sorted(include)), os.environ.get("CPATH", "")]))
    os.environ["PYTHONPATH"] = f"{site}:{os.environ.get('PYTHONPATH', '')}"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    with tempfile.TemporaryDirectory() as folder:  # pip does not add to a package that --target already holds
        for archive in sorted(source.glob("*.tar.gz")):
            timed([*pip, "--target", folder, str(archive)])
        shutil.copytree(folder, site, dirs_exist_ok=True)


def check(site: Path) -> tuple[bool, str]:
    """Whether it can be imported, and its version or the reason."""
    environment = os.environ | {"PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "ignore", "-c", CHECK]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines() or ["no output"]
    return run.returncode == 0, lines[-1]


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="te_install")
@click.option("--source", type=click.Path(path_type=Path), required=True)
@click.option("--site", type=click.Path(path_type=Path), required=True)
def main(findings: Path, step: str, source: Path, site: Path) -> None:
    """Unpacks and, where needed, compiles; then imports it in a process of its own."""
    recorder = Recorder(findings, step)
    site.mkdir(parents=True, exist_ok=True)
    try:
        if source.is_dir() and not any(site.iterdir()):  # else an earlier check unpacked it
            unpack(source, site)
        works, said = check(site)
        if not works and any(source.glob("*.tar.gz")):
            recorder.note("as it was unpacked", said)
            build(source, site)
            works, said = check(site)
    except (subprocess.CalledProcessError, OSError) as error:
        works, said = False, reason_of(error)
    if works or source.is_dir():
        recorder.check("Transformer Engine", said, works)
    else:
        recorder.skip("Transformer Engine", said)


if __name__ == "__main__":
    main()
