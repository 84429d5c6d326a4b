"""Lets other threads of the first rank have work done by its main thread.

Only the main threads of the ranks run collectives, so that every rank runs them in the same order. A rollout thread
that needs all ranks hands a call to the main thread and waits for its result.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class CallsClosedError(RuntimeError):
    """The main thread takes no more calls: the run ends."""


class MainThreadCalls:
    """Calls that wait for the main thread, in the order in which they came.

    `run` may be called from any thread; all other methods belong to the main thread, except `wake`.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.is_closed = False
        self.changed = threading.Condition()  # guards both of the above

    def run(self, function: Callable[[], Result]) -> Result:
        """Has the main thread run `function`; returns its result, or raises its error.

        The main thread itself runs it at once. Raises CallsClosedError when the main thread takes no calls any more.
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
        """Waits until there is a call or `is_done`, at most `seconds` long; returns whether there is a call.

        Whoever changes the answer of `is_done` calls `wake`.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or is_done(), seconds)
            return bool(self.waiting)

    def wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def run_next(self) -> None:
        """Runs the call that has waited longest; the thread that made it gets the result or the error."""
        with self.changed:
            function, future = self.waiting.popleft()
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):  # for example Ctrl-C, which ends the main thread too
                raise

    def close(self) -> None:
        """Lets the threads that wait go, with CallsClosedError."""
        with self.changed:
            self.is_closed = True
            for _, future in self.waiting:
                future.set_exception(CallsClosedError("the main thread takes no more calls"))
            self.waiting.clear()
