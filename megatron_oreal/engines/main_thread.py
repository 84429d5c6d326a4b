"""Lets other threads of the first rank run functions in its main thread.

Only the main threads of the ranks run collectives, so that every rank runs them in the same order. A rollout thread
that needs all ranks passes a call to the main thread and waits for its result.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class CallsClosedError(RuntimeError):
    """Raised if the main thread accepts no more calls, because the run ends."""


class MainThreadCalls:
    """Calls that wait for the main thread, in order of arrival.

    `run` may be called from any thread; all other methods belong to the main thread, except `wake`.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.is_closed = False
        self.changed = threading.Condition()  # guards both fields above

    def run(self, function: Callable[[], Result]) -> Result:
        """Runs `function` in the main thread; returns its result, or raises its error.

        If the caller is the main thread, it runs at once. Raises CallsClosedError if the main thread accepts no more
        calls.
        """
        if threading.current_thread() is threading.main_thread():
            return function()
        future: Future[Result] = Future()
        with self.changed:
            if self.is_closed:
                raise CallsClosedError("the main thread takes no more calls")
            self.waiting.append((function, future))
            self.changed.notify_all()
        return future.result()

    def wait(self, is_done: Callable[[], bool], seconds: float) -> bool:
        """Waits until there is a call or `is_done`, for at most `seconds`; returns whether there is a call.

        The thread that changes the result of `is_done` must call `wake`.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or is_done(), seconds)
            return bool(self.waiting)

    def wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def run_next(self) -> None:
        """Runs the oldest call; the thread that made it gets the result or the error."""
        with self.changed:
            function, future = self.waiting.popleft()
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):  # for example Ctrl-C, which must also end the main thread
                raise

    def close(self) -> None:
        """Ends the waits of other threads with CallsClosedError."""
        with self.changed:
            self.is_closed = True
            for _, future in self.waiting:
                future.set_exception(CallsClosedError("the main thread takes no more calls"))
            self.waiting.clear()
