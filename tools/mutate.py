"""Changes single lines of the product and reports which changes no test notices.

    python tools/mutate.py --sample 150 --seed 1 --out mutants      # goes on where it was interrupted
    python tools/mutate.py --only megatron_oreal/rollout/ledger.py --out mutants
    python tools/mutate.py --list --only megatron_oreal/models/optimizer.py

A mutant is one changed expression or statement. It is written into a copy of the checkout, and the tests of its module
that run its line are run there, in a process that is forked from one that has imported torch: a few seconds a mutant.
The first pass over a module's tests finds out which of them run which lines. `OUT/mutants.jsonl` holds the results,
`OUT/report.md` what survived. tools/mutation/accepted.json says why a survivor is no gap: by file, line and change.
mutmut and cosmic-ray were looked at: the first leaves out constants of modules and decorated functions, and the second
starts Python, and imports torch, once a mutant.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.mutation.operators import Mutant, mutants_of  # noqa: E402

ACCEPTED = ROOT / "tools" / "mutation" / "accepted.json"
TRACER = "tools.mutation.tracer"
HEAVY = (
    "torch", "numpy", "transformers", "safetensors.torch", "pydantic", "sympy", "yaml", "aiohttp", "pytest",
    "megatron.core.models.gpt", "megatron.core.optimizer", "megatron.core.distributed", "torch.distributed.checkpoint",
    "megatron.core.optimizer_param_scheduler", "transformers.models.qwen2.modeling_qwen2",
)  # fmt: skip
SECONDS, FACTOR = 60.0, 6.0  # a mutant's tests may take so long, or so many times what they took before
CHOSEN = "not sglang and not slow and not gpu"
# Which tests judge which modules. What starts processes of its own is left out where tests in this process do as well.
TESTS: dict[str, tuple[str, ...]] = {
    "megatron_oreal/algorithms/*.py": ("tests/algorithms",),
    "megatron_oreal/data/packing.py": ("tests/data/test_packing.py", "tests/algorithms/test_oreal.py"),
    "megatron_oreal/rewards/*.py": ("tests/rewards",),
    "megatron_oreal/rollout/ledger.py": (
        "tests/rollout/test_ledger.py",
        "tests/rollout/test_ledger_on_disk.py",
        "tests/rollout/test_producer.py",
    ),
    "megatron_oreal/models/optimizer.py": (
        "tests/models/test_optimizer_step.py",
        "tests/models/test_schedule.py",
        "tests/models/test_decay.py",
        "tests/run/test_device_defaults.py",
    ),
    "megatron_oreal/weights/*.py": (
        "tests/weights/test_families.py",
        "tests/weights/test_defaults.py",
        "tests/weights/test_fingerprint.py",
        "tests/weights/test_hf_directory.py",
        "tests/weights/test_initial.py",
        "tests/weights/test_stream.py",
        "tests/weights/test_stream_filters.py",
        "tests/conversion/test_conversion.py",
        "tests/conversion/test_megatron_lm.py",
        "tests/conversion/test_logits.py",
    ),
    "megatron_oreal/checkpoint/*.py": ("tests/checkpoint",),
}


@dataclass(frozen=True, slots=True)
class Result:
    mutant: str  # its key
    file: str
    line: int
    change: str
    status: str  # killed, survived or timeout
    num_tests: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="run so many mutants, chosen at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--only", action="append", default=[], help="a file or a pattern; may be given several times")
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time")
    parser.add_argument("--out", type=Path, default=Path("mutants"), help="folder of the results")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    chosen = choose(options.only, options.sample, options.seed)
    if options.list:
        print("\n".join(mutant.key for mutant in chosen))
        return
    if not chosen:
        parser.error("no mutant fits --only: give files of " + ", ".join(TESTS))
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    known = read_results(options.out)
    todo = [mutant for mutant in chosen if mutant.key not in known]
    print(f"{len(chosen)} mutants, {len(chosen) - len(todo)} of them done", flush=True)
    shares = [todo[number :: options.workers] for number in range(options.workers)]
    pids = [start_worker(share, options.out) for share in shares if share]
    for pid in pids:
        os.waitpid(pid, 0)
    known = read_results(options.out)
    report = make_report([known[mutant.key] for mutant in chosen if mutant.key in known], options)
    (options.out / "report.md").write_text(report)
    print(report)


def choose(only: list[str], sample: int | None, seed: int) -> list[Mutant]:
    """The mutants of all modules, or of those that `only` names, in the order of the files."""
    files = sorted({file for pattern in TESTS for file in ROOT.glob(pattern) if file.name != "__init__.py"})
    names = [str(file.relative_to(ROOT)) for file in files]
    wanted = [name for name in names if not only or any(fnmatch(name, pattern) for pattern in only)]
    by_pattern: dict[str, list[Mutant]] = {}
    for name in wanted:
        by_pattern.setdefault(pattern_of(name), []).extend(mutants_of(name, (ROOT / name).read_text()))
    if sample is None:
        return [mutant for mutants in by_pattern.values() for mutant in mutants]
    chosen: list[Mutant] = []
    for number, mutants in enumerate(sorted(by_pattern.values(), key=len)):  # as many of each package as there are
        share = min(len(mutants), math.ceil((sample - len(chosen)) / (len(by_pattern) - number)))
        chosen += random.Random(seed).sample(mutants, share)
    return sorted(chosen, key=lambda mutant: (mutant.file, mutant.line))


def pattern_of(file: str) -> str:
    return next(pattern for pattern in TESTS if fnmatch(file, pattern))


def tests_of(file: str) -> tuple[str, ...]:
    return tuple(test for test in TESTS[pattern_of(file)] if (ROOT / test).exists())


def start_worker(mutants: list[Mutant], out: Path) -> int:
    """A process that runs its mutants in a copy of the checkout, one after the other."""
    if (pid := os.fork()) != 0:
        return pid
    status = 1
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            run_all(mutants, Path(folder), out)
        status = 0
    finally:
        os._exit(status)


def run_all(mutants: list[Mutant], copy: Path, out: Path) -> None:
    copy_checkout(copy)
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[0] = str(copy)
    sys.dont_write_bytecode = True
    os.chdir(copy)
    for name in HEAVY:
        __import__(name)
    traced: dict[tuple[str, ...], dict[str, Any]] = {}
    for mutant in mutants:
        tests = tests_of(mutant.file)
        if tests not in traced:
            traced[tests] = trace(tests, out)
        begin = time.monotonic()
        names, before = covering(traced[tests], mutant)
        file = copy / mutant.file
        original = file.read_text()
        file.write_text(mutant.source)
        try:
            status = run_tests(names, max(SECONDS, FACTOR * before))
            if status in ("survived", "unknown"):  # what is made once for several tests counts for the first of them
                status = run_tests(list(tests), 600.0)
        finally:
            file.write_text(original)
        result = Result(
            mutant.key, mutant.file, mutant.line, mutant.change, status, len(names), time.monotonic() - begin
        )
        with (out / "mutants.jsonl").open("a") as results:
            results.write(json.dumps(asdict(result)) + "\n")
        print(f"{status:9}{result.seconds:6.1f} s  {mutant.key}", flush=True)


def copy_checkout(copy: Path) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)


def trace(tests: tuple[str, ...], out: Path) -> dict[str, Any]:
    """{test: {"seconds": .., "lines": {file: [line, ..]}}} of an unchanged checkout, whose tests must pass."""
    sources = sorted(Path("megatron_oreal").rglob("*.py")) + sorted(Path("tests").rglob("*.py"))
    digest = hashlib.sha256(repr(tests).encode() + b"".join(file.read_bytes() for file in sources)).hexdigest()
    file = out / f"traced-{digest[:16]}.json"
    if not file.is_file():
        os.environ["MUTATE_TRACE"] = str(file)
        status = run_tests(list(tests), 3600.0, "-p", TRACER)
        del os.environ["MUTATE_TRACE"]
        if status != "survived":
            file.unlink(missing_ok=True)
            raise SystemExit(f"the tests {', '.join(tests)} fail before anything is changed")
    return dict(json.loads(file.read_text()))


def covering(traced: dict[str, Any], mutant: Mutant) -> tuple[list[str], float]:
    """The tests that run the mutant's lines, quickest first, and their seconds; all tests where none is known to."""
    lines = set(range(mutant.line, mutant.last_line + 1))
    hit = [name for name, test in traced.items() if lines & {*test["lines"].get(mutant.file, [])}]
    hit = sorted(hit or traced, key=lambda name: traced[name]["seconds"])
    return hit, sum(traced[name]["seconds"] for name in hit)


def run_tests(names: list[str], seconds: float, *arguments: str) -> str:
    """Runs pytest in a forked process group: killed, survived, timeout, or unknown."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        status = 1
        try:
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-m", CHOSEN, "--no-header", *arguments]
            status = int(pytest.main([*options, *names]))
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    try:
        os.killpg(pid, signal.SIGKILL)  # and what the tests have left
    except ProcessLookupError:
        pass
    if not done:
        os.waitpid(pid, 0)
        return "timeout"
    code = os.waitstatus_to_exitcode(status)
    return {0: "survived", 4: "unknown"}.get(code, "killed")  # 4: a test was not found, for whatever reason


def read_results(out: Path) -> dict[str, Result]:
    file = out / "mutants.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {result["mutant"]: Result(**result) for result in map(json.loads, lines)}


def make_report(results: list[Result], options: argparse.Namespace) -> str:
    accepted = json.loads(ACCEPTED.read_text()) if ACCEPTED.is_file() else {}
    survivors = [result for result in results if result.status == "survived"]
    gaps = [result for result in survivors if result.mutant not in accepted]
    reasons = Counter(accepted[result.mutant]["kind"] for result in survivors if result.mutant in accepted)
    behaving = len(results) - reasons["same behaviour"]
    share = 100 * (len(survivors) - reasons["same behaviour"]) / max(1, behaving)
    lines = [
        f"# {len(results)} mutants (sample {options.sample}, seed {options.seed})",
        "",
        f"{len(results) - len(survivors)} killed, {len(survivors)} survived: {reasons['same behaviour']} change no "
        f"behaviour, {reasons['accepted']} are accepted, {len(gaps)} are gaps. "
        f"Of those that change behaviour, {share:.1f} % survived.",
        "",
        "| file | mutants | survived |",
        "| --- | ---: | ---: |",
    ]
    for file in sorted({result.file for result in results}):
        of_file = [result for result in results if result.file == file]
        lines.append(f"| {file} | {len(of_file)} | {sum(result.status == 'survived' for result in of_file)} |")
    lines += ["", "| survived | why it is no gap |", "| --- | --- |"]
    for result in survivors:
        why = accepted.get(result.mutant, {"kind": "GAP", "reason": ""})
        change = result.change.replace("|", "\\|")
        lines.append(f"| {result.file}:{result.line}: `{change}` | {why['kind']}: {why['reason']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
