"""Records the environment of each start of the run: RUN_DIR/environment.jsonl has one line for each start.

{"started": "2026-11-27 15:04:05", "start_step": 0, "commit": "03335fc", "torch": "2.13.0", "gpu": "NVIDIA H100", ...}
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_oreal.observability.files import write_atomically

FILE = "environment.jsonl"
PACKAGES = ("megatron_oreal", "torch", "megatron-core", "transformers", "transformer-engine", "numpy", "math-verify")
GIT_SECONDS = 5.0


def record_environment(run_dir: Path, start_step: int, facts: dict[str, object]) -> None:
    """Adds the line of this start; `facts` are what only the run knows. Only the first rank calls it."""
    line = {"started": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "start_step": start_step} | read_environment() | facts
    path = run_dir / FILE
    earlier = path.read_bytes() if path.is_file() else b""
    write_atomically(path, earlier + json.dumps(line).encode() + b"\n")


def read_environment() -> dict[str, object]:
    """Returns the machine, the versions and the commit. Leaves out what it cannot determine."""
    found: dict[str, object] = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count() or 1,
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "SLURM_JOB_ID" in os.environ:
        found["slurm_job"] = os.environ["SLURM_JOB_ID"]
    return found | read_commit(Path(__file__).parent)


def read_commit(folder: Path) -> dict[str, object]:
    """Returns the commit of the checkout that contains `folder`, and whether files differ from it; {} if none."""
    commit = git_output(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changes = git_output(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "is_changed": bool(changes)}


def git_output(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
