"""Logs some of many failures: the first, the second, the fourth, the eighth and so on."""

from __future__ import annotations

import threading

from megatron_oreal.types import Notify


class FailureNotes:
    """Counts failures and logs some of them. Any thread may add failures."""

    def __init__(self, what: str, notify: Notify) -> None:
        """`what` begins the logged line, for example "the judge gave no opinion on"."""
        self.what, self.notify = what, notify
        self.count = 0  # of the whole run
        self.next_note = 1
        self.lock = threading.Lock()

    def add(self, message: str, count: int = 1) -> None:
        with self.lock:
            self.count += count
            if self.count < self.next_note:
                return
            while self.next_note <= self.count:
                self.next_note *= 2
            line = f"{self.what} {self.count} samples so far; the last time: {message}"
        self.notify(line)
