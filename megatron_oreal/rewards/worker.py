r"""The worker process: compares pairs of LaTeX answers with math-verify, one JSON line in, one JSON line out.

Run as a script by `worker_pool`, so that it imports neither torch nor this package: started in half a second.
A comparison that spends its CPU budget ends the process, by a signal whose action nothing in Python can delay.

    in   {"answer": ..., "prediction": ...}
    out  {"ready": true}, then {"is_equal": true} or {"is_equal": null} when the comparison itself failed
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this file's folder: its module names must not hide anyone's

import argparse
import ctypes
import functools
import json
import logging
import os
import resource
import signal
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

PR_SET_PDEATHSIG = 1
RELATIVE_TOLERANCE = 1e-5  # math-verify rounds floats to six decimals, whatever their size
RECURSION_LIMIT = 5000  # the parser takes some twenty frames a nested group

# The box is all we send, so only boxes are looked for: no "last number in the text".
EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]


def parse_boxed(latex: str) -> list[Any]:
    return list(parse(rf"\boxed{{{latex}}}", EXTRACTION, parsing_timeout=None))


# The samples of a group share their reference answer.
parse_answer = functools.lru_cache(maxsize=256)(parse_boxed)


def is_equal(answer: str, prediction: str) -> bool:
    """The order matters to math-verify: it follows the reference's form."""
    gold, candidate = parse_answer(answer), parse_boxed(prediction)
    if not verify(gold, candidate, numeric_precision=50, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    return not gold or not candidate or has_same_magnitude(gold[0], candidate[0])


def has_same_magnitude(gold: Any, candidate: Any) -> bool:
    """False for two numbers that only rounding to absolute decimals makes equal, such as pi / 10^7 and 0.0."""
    if not all(isinstance(value, sympy.Expr) and value.is_number for value in (gold, candidate)):
        return True
    try:
        exact, approximate = complex(gold.evalf(30)), complex(candidate.evalf(30))
    except (TypeError, ValueError, OverflowError):
        return True  # infinite, or not a number after all
    return abs(exact - approximate) <= RELATIVE_TOLERANCE * max(abs(exact), abs(approximate))


def confine(parent_pid: int, memory_bytes: int) -> None:
    """Limits of this process; it ends with the thread that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing that is parsed here has a reason to write files
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)  # the parent ended before its worker was ready: nobody is there to be told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--cpu-seconds", type=float, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    options = parser.parse_args()

    # Whatever the libraries print must not reach the protocol.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    confine(options.parent_pid, options.memory_bytes)
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(RECURSION_LIMIT)
    is_equal(r"\frac{1}{2}", "1/2")  # builds the parser's tables outside of any budget
    os.dup2(null, 2)

    replies.write(b'{"ready": true}\n')
    for line in sys.stdin.buffer:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, options.cpu_seconds)
        try:
            equal: bool | None = is_equal(job["answer"], job["prediction"])
        except Exception:  # noqa: BLE001  # anything may come out of an algebra system; the caller counts it
            equal = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps({"is_equal": equal}).encode() + b"\n")


if __name__ == "__main__":
    main()
