"""A plugin of pytest: which lines of the product each test runs, and how long it takes, for tools/mutate.py."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

PACKAGE = str(Path.cwd() / "megatron_oreal") + os.sep
LINES: dict[str, set[int]] = {}
TESTS: dict[str, dict[str, Any]] = {}
SEEN: dict[str, bool] = {}


def local(frame: FrameType, event: str, _argument: object) -> Any:
    if event == "line":
        LINES.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
    return local


def trace(frame: FrameType, _event: str, _argument: object) -> Any:
    name = frame.f_code.co_filename
    if name not in SEEN:
        SEEN[name] = name.startswith(PACKAGE)
    if not SEEN[name]:
        return None
    LINES.setdefault(name, set()).add(frame.f_lineno)
    return local


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fixtures of a module count for the test that sets them up: the others need it too, so it comes with them."""
    LINES.clear()
    begin = time.monotonic()
    threading.settrace(trace)
    sys.settrace(trace)
    yield
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]
    root = Path.cwd()
    lines = {str(Path(name).relative_to(root)): sorted(numbers) for name, numbers in LINES.items()}
    TESTS[item.nodeid] = {"seconds": time.monotonic() - begin, "lines": lines}


def pytest_sessionfinish() -> None:
    Path(os.environ["MUTATE_TRACE"]).write_text(json.dumps(TESTS))
