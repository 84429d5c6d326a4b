"""Calls that other threads hand to the main thread."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from megatron_oreal.engines.main_thread import CallsClosedError, MainThreadCalls
from megatron_oreal.rollout.group_broadcast import in_thread


def run_in_thread(calls: MainThreadCalls, function: Callable[[], object]) -> Future[object]:
    future = in_thread(lambda: calls.run(function))
    future.add_done_callback(lambda _: calls.wake())
    return future


def test_the_main_thread_runs_the_call_and_the_other_thread_gets_the_result() -> None:
    calls = MainThreadCalls()
    future = run_in_thread(calls, threading.current_thread)
    assert calls.wait(future.done, 30)
    calls.run_next()
    assert future.result(30) is threading.main_thread()
    assert not calls.wait(future.done, 30)  # there is no other call


def test_the_main_thread_itself_need_not_wait_for_itself() -> None:
    assert MainThreadCalls().run(lambda: 5) == 5


def test_an_error_goes_to_the_thread_that_called() -> None:
    calls = MainThreadCalls()
    future = run_in_thread(calls, lambda: [][1])
    assert calls.wait(future.done, 30)
    calls.run_next()
    with pytest.raises(IndexError):
        future.result(30)


def test_ctrl_c_ends_both_threads() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    calls = MainThreadCalls()
    future = run_in_thread(calls, interrupt)
    assert calls.wait(future.done, 30)
    with pytest.raises(KeyboardInterrupt):
        calls.run_next()
    with pytest.raises(KeyboardInterrupt):
        future.result(30)


def test_closing_lets_the_threads_go() -> None:
    calls = MainThreadCalls()
    waiting = run_in_thread(calls, lambda: 1)
    assert calls.wait(waiting.done, 30)
    calls.close()
    for future in (waiting, run_in_thread(calls, lambda: 2)):
        with pytest.raises(CallsClosedError):
            future.result(30)


def test_waiting_has_an_end() -> None:
    assert not MainThreadCalls().wait(lambda: False, 0.01)
