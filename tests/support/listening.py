"""Records the TCP sockets on which a process tree listens while it runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

from megatron_oreal.engines.sglang.servers.launcher import descendants
from megatron_oreal.engines.sglang.servers.listening import Listener, listeners, sockets_of


def listeners_of_tree(process: int) -> set[Listener]:
    """Returns all TCP sockets on which a process or one of its descendants listens now."""
    own = sockets_of([process, *descendants(process)])
    return {listener for listener in listeners(process) or [] if listener.inode in own}


def watch(process: subprocess.Popen[Any], until: Callable[[], bool] = lambda: False) -> set[Listener]:
    """Returns all sockets on which the tree has listened until the process ends or `until` returns true."""
    seen: set[Listener] = set()
    while process.poll() is None and not until():
        seen |= listeners_of_tree(process.pid)
        time.sleep(0.02)
    return seen
