"""Stores the judge's opinions in a file, so that no process or run asks the same question again.

SQLite's locks make the file safe for several processes of one machine. The file holds opinions, not failures. If it
cannot be read or written, the verifier asks the judge: the file saves requests and changes no verdict.
"""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_oreal.observability.closing import Closing
from megatron_oreal.types import Notify

LOCK_SECONDS = 10.0  # longest wait for another process
TABLE = "CREATE TABLE IF NOT EXISTS opinions (key TEXT PRIMARY KEY, is_accepted INTEGER NOT NULL, reply TEXT NOT NULL)"


class JudgeCache(Closing):
    """Maps keys to known opinions. One thread owns the connection, so that a slow disk does not delay requests."""

    def __init__(self, path: Path, notify: Notify) -> None:
        self.path, self.notify = path, notify
        self.thread = ThreadPoolExecutor(1, "judge-cache")
        self.connection: sqlite3.Connection | None = None
        self.is_broken = False

    def check(self) -> None:
        """Raises ValueError if the file exists and is not a file of opinions."""
        if not self.path.exists():
            return
        try:
            with sqlite3.connect(self.path.absolute().as_uri() + "?mode=ro", uri=True, timeout=LOCK_SECONDS) as found:
                found.execute("SELECT key, is_accepted, reply FROM opinions LIMIT 1").fetchone()
            found.close()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error) and self.path.stat().st_size == 0:
                return
            raise ValueError(f"verifier.judge.cache: {self.path} cannot be read ({error})") from None
        except sqlite3.DatabaseError:
            raise ValueError(
                f"verifier.judge.cache: {self.path} is damaged, or is no file of opinions; remove it or name another"
            ) from None

    async def find(self, key: str) -> bool | None:
        """Returns whether the judge accepted the answer; None if no opinion is stored."""
        return await asyncio.wrap_future(self.thread.submit(self._find, key))

    async def add(self, key: str, is_accepted: bool, reply: str) -> bool:
        """Stores an opinion and returns the one that counts: the first, if two processes asked at the same time."""
        return await asyncio.wrap_future(self.thread.submit(self._add, key, is_accepted, reply))

    def close(self) -> None:
        self.thread.submit(self._close).result()
        self.thread.shutdown()

    def _find(self, key: str) -> bool | None:
        try:
            row = self._open().execute("SELECT is_accepted FROM opinions WHERE key = ?", (key,)).fetchone()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            return None
        return None if row is None else bool(row[0])

    def _add(self, key: str, is_accepted: bool, reply: str) -> bool:
        try:
            with self._open() as connection:
                connection.execute("INSERT OR IGNORE INTO opinions VALUES (?, ?, ?)", (key, int(is_accepted), reply))
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            return is_accepted
        known = self._find(key)
        return is_accepted if known is None else known

    def _open(self) -> sqlite3.Connection:
        if self.connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(self.path, timeout=LOCK_SECONDS)
            self.connection.execute(TABLE)
        return self.connection

    def _give_up(self, error: Exception) -> None:
        """Logs the problem once; later calls may succeed."""
        if not self.is_broken:
            self.is_broken = True
            self.notify(f"the judge's file of opinions {self.path} fails ({error}); the judge is asked again instead")

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
