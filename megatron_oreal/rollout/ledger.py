"""Writes responses to disk as soon as they end, so that a restarted run generates only the missing ones.

    RUN_DIR/ledger/weights.jsonl      the fingerprint of each policy version
    RUN_DIR/ledger/step_000007.bin    the responses of step 7, in the order in which they ended

A record consists of its length, its checksum, a JSON header and the numbers of its tokens. The ledger finds a record by
its prompt, seed and sampling parameters. It uses the record if the run has the weights that generated its newest token,
which it checks by the weights' fingerprints. A torn record and everything after it is ignored. Responses that a step
abandoned go to the next step's file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np

from megatron_oreal.engines.engine import ALONE, BatchIndex, Generation, GenerationRequest, SamplingParams
from megatron_oreal.observability.closing import Closing
from megatron_oreal.observability.files import sync_folder, write_atomically
from megatron_oreal.types import FinishReason, Int32Array

STEP_FILE = re.compile(r"step_(\d+)\.bin")
FRAME = struct.Struct("<III")  # bytes of the header, bytes of the numbers, checksum of both


@dataclass(slots=True, frozen=True)
class Header:
    key: str  # see response_key
    weights: str  # fingerprint of the weights that generated the newest token; empty if it was not known yet
    is_carried: bool  # the previous step abandoned it
    finish_reason: FinishReason  # abort: it can be continued
    num_tokens: int
    has_rollout_logprobs: bool
    policy_versions: list[tuple[int, int]]  # runs of (version, number of tokens)
    batch: BatchIndex = ALONE  # the records of a batch are consecutive


HEADER_FIELDS = tuple(field.name for field in fields(Header))


@dataclass(slots=True, frozen=True)
class Record:
    header: Header
    numbers: bytes  # token ids as int32, then log-probs as float64
    number: int  # index among its step's records
    is_ours: bool  # whether this process wrote it

    @property
    def generation(self) -> Generation:
        header = self.header
        ids = np.frombuffer(self.numbers, "<i4", header.num_tokens)
        logprobs = np.frombuffer(self.numbers, "<f8", offset=4 * header.num_tokens).astype(np.float32)
        num_rollout = header.num_tokens if header.has_rollout_logprobs else 0
        versions = np.repeat(*np.array(header.policy_versions, dtype=np.int32).reshape(-1, 2).T)
        return Generation(ids, logprobs[:num_rollout], logprobs[num_rollout:], header.finish_reason, versions)

    @property
    def newest_version(self) -> int:
        return max(version for version, _ in self.header.policy_versions)

    @property
    def oldest_version(self) -> int:
        return min(version for version, _ in self.header.policy_versions)

    def rank(self, oldest_version: int) -> tuple[bool, bool, int]:
        """Returns a rank for choosing among several responses to one request: the largest one is used."""
        is_whole = self.header.finish_reason != "abort"
        return self.oldest_version >= oldest_version, is_whole, self.header.num_tokens

    @property
    def place(self) -> tuple[bool, int]:
        """Returns a sort key: the order in which a step gets its responses, with those of the previous step first."""
        return not self.header.is_carried, self.number

    def encode(self) -> bytes:
        head = json.dumps({name: getattr(self.header, name) for name in HEADER_FIELDS}).encode()
        checksum = zlib.crc32(self.numbers, zlib.crc32(head))
        return FRAME.pack(len(head), len(self.numbers), checksum) + head + self.numbers


class Ledger(Closing):
    """Stores responses. Any thread may call any method. Without a folder, it only passes responses to the next step."""

    def __init__(self, folder: Path | None, start_step: int = 0) -> None:
        """Reads what an interrupted run left for `start_step` and later steps; removes what is older."""
        self.folder = folder
        self.lock = threading.Lock()  # guards the fields below
        self.syncing = threading.Lock()  # held while the disk writes
        self.unsynced: set[int] = set()  # steps with records that may not be on disk yet
        self.files: dict[int, IO[bytes]] = {}
        self.records: dict[int, dict[str, list[Record]]] = {}  # step -> key -> in the order of writing
        self.weights: dict[int, str] = {}  # policy version -> fingerprint
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_before(start_step)
            for step, path in step_files(folder).items():
                for record in of_whole_batches(read_records(path)):
                    self._keep(step, record)
            # Versions from here on count as unchanged only if the new weights have the same fingerprint.
            known = read_weights(folder / "weights.jsonl")
            self.weights = {version: fingerprint for version, fingerprint in known.items() if version < start_step}
            lines = (weights_line(version, fingerprint) for version, fingerprint in self.weights.items())
            write_atomically(folder / "weights.jsonl", "".join(lines))

    def set_weights(self, version: int, fingerprint: str) -> None:
        """Sets the weights of `version`."""
        with self.lock:
            self.weights[version] = fingerprint
            if self.folder is not None:
                with (self.folder / "weights.jsonl").open("a") as file:
                    file.write(weights_line(version, fingerprint))
                    file.flush()
                    os.fsync(file.fileno())

    def find(self, step: int, key: str, oldest_version: int = 0) -> Record | None:
        """Returns the most complete response to the request of this key that the run's own weights generated.

        Returns a response with a token of weights before `oldest_version` only if there is no other.
        """
        with self.lock:
            return self._find(step, key, oldest_version)

    def add(self, step: int, key: str, generation: Generation, batch: BatchIndex = ALONE) -> None:
        """Writes a response that has ended. It survives a process kill at once, and a machine crash after `sync`.

        After a kill, a batch is used as a whole or not at all, because regenerating a part of it would give other last
        digits.
        """
        with self.lock:
            self._write(step, key, generation, batch=batch)

    def carry(self, step: int, key: str, generation: Generation) -> None:
        """Passes a response, complete or partial, to `step`, unless `step` has it from before a kill."""
        with self.lock:
            if self._find(step, key, 0) is None:
                self._keep(step, self._write(step, key, generation, is_carried=True))

    def sync(self, step: int) -> None:
        """Waits until everything that was written for `step` before this call is on disk."""
        with self.syncing:
            with self.lock:
                file = self.files.get(step) if step in self.unsynced else None
                self.unsynced.discard(step)
            if file is not None:  # a slow disk must not stop other threads from writing
                os.fsync(file.fileno())

    def finish(self, step: int) -> None:
        """Drops the step's responses. This process will not look them up again."""
        with self.lock:
            self.records.pop(step, None)

    def remove_before(self, step: int) -> None:
        """Removes the files of steps that a checkpoint has made unnecessary."""
        with self.lock:
            self._remove_before(step)

    def close(self) -> None:
        with self.lock:
            for file in self.files.values():
                file.close()
            self.files = {}

    def _find(self, step: int, key: str, oldest_version: int) -> Record | None:
        records = self.records.get(step, {}).get(key, [])
        return max(filter(self._is_valid, records), key=lambda record: record.rank(oldest_version), default=None)

    def _is_valid(self, record: Record) -> bool:
        made_by = record.header.weights
        return record.is_ours or (made_by != "" and made_by == self.weights.get(record.newest_version))

    def _keep(self, step: int, record: Record) -> None:
        self.records.setdefault(step, {}).setdefault(record.header.key, []).append(record)

    def _write(
        self, step: int, key: str, generation: Generation, is_carried: bool = False, batch: BatchIndex = ALONE
    ) -> Record:
        header = Header(
            key=key,
            weights=self.weights.get(int(generation.policy_versions.max()), ""),
            is_carried=is_carried,
            finish_reason=generation.finish_reason,
            num_tokens=len(generation.response_ids),
            has_rollout_logprobs=len(generation.rollout_logprobs) > 0,
            policy_versions=runs(generation.policy_versions),
            batch=batch,
        )
        ids = generation.response_ids.astype("<i4")
        logprobs = np.concatenate([generation.rollout_logprobs, generation.model_logprobs]).astype("<f8")
        number = len(self.records.get(step, {}))
        record = Record(header, ids.tobytes() + logprobs.tobytes(), number, is_ours=True)
        if self.folder is not None:
            if step not in self.files:
                self.files[step] = (self.folder / f"step_{step:06d}.bin").open("ab")
                sync_folder(self.folder)
            self.files[step].write(record.encode())
            if batch.position == batch.size - 1:  # an incomplete batch is useless
                self.files[step].flush()
            self.unsynced.add(step)
        return record

    def _remove_before(self, step: int) -> None:
        if self.folder is None:
            return
        for old, path in step_files(self.folder).items():
            if old < step:
                if old in self.files:
                    self.files.pop(old).close()
                path.unlink()


def response_key(request: GenerationRequest, params: SamplingParams) -> str:
    """Returns a digest of everything that determines a response besides the weights."""
    parts = f"[{json.dumps(request.prompt_ids.tolist())}, {request.seed}, {params_text(params)}]"
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


@cache
def params_text(params: SamplingParams) -> str:
    given = asdict(params)
    # Settings that older ledgers do not know are part of the digest only if they are set.
    unset = {name for name in ("max_total_tokens", "stop_strings") if not given[name]}
    return json.dumps({name: value for name, value in given.items() if name not in unset}, sort_keys=True)


def runs(values: Int32Array) -> list[tuple[int, int]]:
    """Returns (value, length) of each run of equal values: 3 3 3 4 -> (3, 3), (4, 1)."""
    if len(values) and (values == values[0]).all():  # the usual case, which this makes ten times as fast
        return [(int(values[0]), len(values))]
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    lengths = np.diff(starts, append=len(values))
    return list(zip(values[starts].tolist(), lengths.tolist(), strict=True))


def read_records(path: Path) -> list[Record]:
    """Returns the complete records at the file's beginning, and truncates the rest, so that more records can follow."""
    content = path.read_bytes()
    records, end = parse_records(content)
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    return records


def parse_records(content: bytes) -> tuple[list[Record], int]:
    """Returns the complete records at the beginning of a file's content, and the position of their end."""
    records: list[Record] = []
    start = 0
    while start + FRAME.size <= len(content):
        head_size, numbers_size, checksum = FRAME.unpack_from(content, start)
        middle = start + FRAME.size + head_size
        head, numbers = content[start + FRAME.size : middle], content[middle : middle + numbers_size]
        # A power cut may leave zeros.
        if not head_size or len(numbers) < numbers_size or zlib.crc32(numbers, zlib.crc32(head)) != checksum:
            break
        records.append(Record(Header(**json.loads(head)), numbers, number=len(records), is_ours=False))
        start = middle + numbers_size
    return records, start


def of_whole_batches(records: Sequence[Record]) -> list[Record]:
    """Leaves out the records of batches that were not written completely."""
    whole: list[Record] = []
    batch: list[Record] = []
    for record in records:
        position, size = record.header.batch
        if position == 0:
            batch = []
        if position == len(batch):
            batch.append(record)
        if len(batch) == size:
            whole += batch
            batch = []
    return whole


def step_files(folder: Path) -> dict[int, Path]:
    """Returns the folder's files by step, in ascending order."""
    matches = ((STEP_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def weights_line(version: int, fingerprint: str) -> str:
    return json.dumps({"version": version, "fingerprint": fingerprint}) + "\n"


def read_weights(path: Path) -> dict[int, str]:
    """Returns the last fingerprint of each version; leaves out a torn last line."""
    weights = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        weights[entry["version"]] = entry["fingerprint"]
    return weights
