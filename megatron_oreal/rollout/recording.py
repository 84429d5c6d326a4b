"""Records every response of a run, and defines an engine that replays recorded responses instead of generating.

    RUN_DIR/recording/version_000007.bin    what was generated with the weights of version 7, in the order of the ends

The records have the ledger's format. A response is found by its prompt, seed and sampling parameters, and by the
response that it continued. A run with the same configuration makes the same requests, so a replay has the same groups
and the same update, also on a machine that could not have generated them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor

from megatron_oreal.engines.engine import (
    ALONE,
    BatchIndex,
    Generation,
    GenerationRequest,
    RolloutEngine,
    SamplingParams,
    Watch,
)
from megatron_oreal.engines.main_thread import MainThreadCalls
from megatron_oreal.rollout.ledger import Header, Record, parse_records, response_key, runs
from megatron_oreal.rollout.sampler import with_versions

FOLDER = "recording"


class RecordingEngine:
    """A `RolloutEngine` that records the responses of another engine. Only the first rank's has a folder."""

    def __init__(self, engine: RolloutEngine, folder: Path) -> None:
        self.engine, self.folder, self.calls = engine, folder, engine.calls
        self.lock = threading.Lock()  # guards the files
        self.files: dict[int, IO[bytes]] = {}  # by version
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def version(self) -> int:
        return self.engine.version

    @version.setter
    def version(self, version: int) -> None:
        self.engine.version = version

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        """Implements `RolloutEngine`. Abandoned responses, which the engine passes late or never, are recorded last."""
        version, told = self.engine.version, set[int]()

        def record(index: int, generation: Generation, batch: BatchIndex = ALONE) -> bool:
            told.add(index)
            self._write(version, requests[index], params, generation)
            return watch is not None and watch(index, generation, batch)

        generations = self.engine.generate(requests, params, record)
        for index, generation in enumerate(generations):
            if index not in told:
                self._write(version, requests[index], params, generation)
        with self.lock:
            if version in self.files:
                self.files[version].flush()
            for old in [old for old in self.files if old < version - 1]:
                self.files.pop(old).close()
        return generations

    def _write(self, version: int, request: GenerationRequest, params: SamplingParams, generation: Generation) -> None:
        generation = with_versions(generation, request.begun, version)
        header = Header(
            key=recording_key(request, params),
            weights="",
            is_carried=False,
            finish_reason=generation.finish_reason,
            num_tokens=len(generation.response_ids),
            has_rollout_logprobs=len(generation.rollout_logprobs) > 0,
            policy_versions=runs(generation.policy_versions),
        )
        ids = generation.response_ids.astype("<i4")
        logprobs = np.concatenate([generation.rollout_logprobs, generation.model_logprobs]).astype("<f8")
        record = Record(header, ids.tobytes() + logprobs.tobytes(), number=0, is_ours=True)
        with self.lock:
            if version not in self.files:
                self.files[version] = recording_file(self.folder, version).open("ab")
            self.files[version].write(record.encode())

    def take_part(self) -> None:
        self.engine.take_part()

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.update_weights(stream, version)

    def flush_metrics(self) -> dict[str, float]:
        return self.engine.flush_metrics()

    def close(self) -> None:
        """Closes the files. The engine's owner closes the engine."""
        with self.lock:
            for file in self.files.values():
                file.close()
            self.files = {}


class ReplayEngine:
    """A `RolloutEngine` that generates nothing. The first rank reads the recording.

    window: the largest difference between the current version and the recorded version of a response. With
    rollout.staleness, the version at a request depends on the load. The recorded response is used in any case.
    """

    def __init__(self, run_dir: Path, window: int = 0) -> None:
        """Raises ValueError for a run without a recording."""
        self.folder, self.window = run_dir / FOLDER, window
        self.calls = MainThreadCalls()
        self.version = 0
        self.versions: dict[int, dict[str, Record]] = {}  # version -> key -> record, for versions near `version`
        self.lock = threading.Lock()  # guards `versions`
        if not self.folder.is_dir():
            raise ValueError(f"rollout.replay: {run_dir} holds no {FOLDER}/; record a run with rollout.record=true")

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        """Implements `RolloutEngine`. Raises ValueError for a request that the recorded run did not make."""
        with self.lock:
            found = [self._find(request, params) for request in requests]
        generations = [record.generation for _, record in found]
        for index in sorted(range(len(found)), key=lambda index: (found[index][0], found[index][1].number)):
            is_whole = generations[index].finish_reason != "abort"
            if is_whole and watch is not None and watch(index, generations[index]):
                break
        return generations

    def _find(self, request: GenerationRequest, params: SamplingParams) -> tuple[int, Record]:
        """Returns the record and its version, from the nearest version that has one."""
        key, now = recording_key(request, params), self.version
        for distance in range(self.window + 1):
            for version in sorted({now - distance, now + distance}):
                record = self._records(version).get(key)
                if record is not None:
                    return version, record
        raise ValueError(
            f"rollout.replay: {self.folder} has no response that weights of version {now} gave to one of the requests: "
            "the recorded run has not come to this step, or had another seed, other data, or other settings of rollout"
        )

    def _records(self, version: int) -> dict[str, Record]:
        for old in [old for old in self.versions if old < self.version - self.window]:
            del self.versions[old]
        if version not in self.versions:
            path = recording_file(self.folder, version)
            records, _ = parse_records(path.read_bytes() if path.is_file() else b"")
            # A run that was killed has repeated requests; it trained on the last responses.
            self.versions[version] = {record.header.key: record for record in records}
        return self.versions[version]

    def take_part(self) -> None:
        raise AssertionError("a replay makes no calls")

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Reads the weights and drops them, because all ranks take part in the stream, which also measures them."""
        for _ in stream:
            pass
        self.version = version

    def flush_metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.versions = {}


def recording_key(request: GenerationRequest, params: SamplingParams) -> str:
    num_begun = 0 if request.begun is None else len(request.begun.response_ids)
    return f"{response_key(request, params)}/{num_begun}"


def recording_file(folder: Path, version: int) -> Path:
    return folder / f"version_{version:06d}.bin"
