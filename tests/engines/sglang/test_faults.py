"""Faults of real servers: two runs with one server, the death of the last one, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams
from megatron_oreal.engines.sglang.client import EventLoopThread, ServerError
from megatron_oreal.engines.sglang.engine import SglangEngine
from megatron_oreal.engines.sglang.servers.fleet import ServerFleet, open_servers
from megatron_oreal.engines.sglang.servers.launcher import descendants, shared_memory
from megatron_oreal.engines.sglang.servers.process import ServerSettings
from megatron_oreal.engines.sglang.weights.disk import DiskTransport
from megatron_oreal.rollout.group_broadcast import in_thread
from tests.support.paths import SGLANG_PYTHON

PARAMS = SamplingParams(max_new_tokens=480)
REQUESTS = [GenerationRequest([5, 9, number], number) for number in range(12)]


@contextmanager
def opened(model: Path, folder: Path, fleet: ServerFleet, tell: Callable[[str], None]) -> Iterator[SglangEngine]:
    thread = EventLoopThread("test")
    transport = DiskTransport(thread, 60, folder / "pushed", model, is_main=True)
    config = fleet.settings.config
    engine = SglangEngine(config, model, fleet.endpoints, transport, thread, fleet, tell, None, 1, 30)
    try:
        yield engine
    finally:
        engine.close()


def generate_beside(engine: SglangEngine) -> list[Generation]:
    """Generates in a thread, while the main thread takes part in what the engine asks of it."""
    future = in_thread(lambda: engine.generate(REQUESTS, PARAMS))
    future.add_done_callback(lambda _: engine.calls.wake())
    deadline = time.monotonic() + 500
    while not future.done():
        assert time.monotonic() < deadline
        if engine.calls.wait(future.done, 1):
            engine.take_part()
    return future.result()


@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.timeout(900)  # a server starts twice
def test_two_runs_and_the_death_of_the_last_server(sglang_model: Path, tmp_path: Path) -> None:
    """The same responses come with and without the death of the only server, which leaves no file behind."""
    stream: list[tuple[str, Any]] = list(AutoModelForCausalLM.from_pretrained(sglang_model).state_dict().items())
    config = SglangConfig(python=SGLANG_PYTHON, max_restarts=1, start_timeout_seconds=280)
    settings = ServerSettings(config, sglang_model, "float32", tmp_path / "run", "cpu", context_length=512)
    told: list[str] = []
    with open_servers(settings, told.append) as fleet:
        with opened(sglang_model, tmp_path / "a", fleet, told.append) as engine:
            engine.update_weights(stream, version=2)
            whole = generate_beside(engine)
            supervisor = fleet.processes[fleet.endpoints[0]].supervisor.pid
            files = shared_memory(descendants(supervisor))
            assert files
            time.sleep(3)  # the supervisor has looked at them too
            session = os.getpgid(fleet.pid(fleet.endpoints[0]))
            threading.Timer(0.3, lambda: os.killpg(session, signal.SIGKILL)).start()
            again = generate_beside(engine)
            assert [each.response_ids.tolist() for each in again] == [each.response_ids.tolist() for each in whole]
            assert {version for each in again for version in each.policy_versions} == {2}
            assert not [path for path in files if path.exists()]
            assert any(line.startswith("no SGLang server is left; the rollout has waited 0 s") for line in told)
            with opened(sglang_model, tmp_path / "b", fleet, told.append) as other:
                other.update_weights(stream, version=2)
                with pytest.raises(ServerError, match="has weights of another run"):
                    generate_beside(engine)
