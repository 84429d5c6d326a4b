"""Runs jobs from a queue in threads that each own one worker process."""

from __future__ import annotations

import queue
import subprocess
import threading
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from megatron_oreal.observability.closing import Closing

JOBS_PER_PROCESS = 2000  # then a new process replaces it, because sympy's caches grow
NUM_ATTEMPTS = 2  # a job gets a second attempt, because something else may have ended its process


class OwnedProcess(Protocol):
    process: subprocess.Popen[bytes]
    num_jobs: int

    @property
    def is_running(self) -> bool: ...

    def end(self) -> None: ...


Job = TypeVar("Job")
Result = TypeVar("Result")
Process = TypeVar("Process", bound=OwnedProcess)


class ProcessPool(Closing, Generic[Job, Result, Process]):
    """Up to `num_workers` processes, each started when a job first needs it. Several threads may call the methods."""

    def __init__(self, num_workers: int) -> None:
        if num_workers < 1:
            raise ValueError(f"verifier.num_workers must be >= 1, got {num_workers}")
        self.num_workers = num_workers
        self.jobs: queue.SimpleQueue[tuple[Job, Future[Result]] | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.workers: dict[int, Process] = {}  # key: index of the owning thread
        self.lock = threading.Lock()
        self.is_closed = False
        self.num_unfinished = 0  # jobs in the queue or in a worker

    @abstractmethod
    def start_process(self) -> Process:
        """Starts a worker process, in the thread that will own it."""

    @abstractmethod
    def answer(self, index: int, job: Job) -> Result:
        """Runs a job in the process of thread `index`."""

    def submit_many(self, jobs: Sequence[Job]) -> list[Future[Result]]:
        """Submits jobs. Raises RuntimeError after `close`; a future raises it if no worker can be started."""
        futures: list[Future[Result]] = []
        with self.lock:
            if self.is_closed:
                raise RuntimeError("the verifier is closed")
            self.num_unfinished += len(jobs)
            for job in jobs:
                futures.append(Future())
                self.jobs.put((job, futures[-1]))
            # The kernel ends a worker when the thread that started it ends, so the threads live as long as the pool.
            while len(self.threads) < min(self.num_workers, self.num_unfinished):
                index = len(self.threads)
                thread = threading.Thread(target=self.serve, args=(index,), name=f"verifier-{index}", daemon=True)
                self.threads.append(thread)
                thread.start()
        return futures

    def serve(self, index: int) -> None:
        """Runs jobs in a thread until the queue returns None."""
        while (entry := self.jobs.get()) is not None:
            job, future = entry
            try:
                future.set_result(self.answer(index, job))
            except Exception as error:  # noqa: BLE001  # the future passes it to the caller
                future.set_exception(error)
            finally:
                with self.lock:
                    self.num_unfinished -= 1
        if worker := self.workers.pop(index, None):
            worker.end()

    def running_worker(self, index: int) -> Process:
        worker = self.workers.get(index)
        if worker is not None and worker.is_running and worker.num_jobs < JOBS_PER_PROCESS:
            return worker
        if worker is not None:
            worker.end()
        self.workers[index] = self.start_process()
        return self.workers[index]

    def close(self) -> None:
        """Ends the workers, also during a job; returns when their processes have ended."""
        with self.lock:
            self.is_closed = True
        for worker in list(self.workers.values()):
            worker.process.kill()
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()
        self.threads.clear()
