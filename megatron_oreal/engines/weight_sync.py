"""The policy's weights to the generation engine, after every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_oreal.engines.engine import RolloutEngine
from megatron_oreal.weights.fingerprint import Fingerprint
from megatron_oreal.weights.stream import WeightStream
from megatron_oreal.weights.stream_filters import Stream

Filter = Callable[[Stream], Iterator[tuple[str, Tensor]]]


@dataclass(slots=True, frozen=True)
class PushReport:
    num_bytes: int  # of the model, once
    seconds: float

    def metrics(self) -> dict[str, float]:
        return {"time/weight_sync_gb_per_second": self.num_bytes / 1e9 / max(self.seconds, 1e-9)}


@dataclass(slots=True)
class FilteredStream:
    """Each iteration begins anew: an engine whose server fails asks for the weights again."""

    stream: Stream
    filters: Sequence[Filter]
    num_bytes: int = 0  # of the last iteration

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.num_bytes = 0
        filtered = self.stream
        for each in self.filters:
            filtered = each(filtered)
        for name, tensor in filtered:
            self.num_bytes += tensor.nbytes
            yield name, tensor


@dataclass(slots=True)
class WeightSync:
    stream: WeightStream  # of the live policy: iterating it again reads the weights as they are then
    engine: RolloutEngine
    filters: Sequence[Filter] = ()  # what the engine wants, e.g. another dtype; see checkpoint.stream_filters
    has_fingerprint: bool = False  # whether a push computes one, for the ledger
    fingerprint: str = ""  # of the weights that were pushed last
    last_report: PushReport | None = None

    def push(self, version: int) -> PushReport:
        """Collective."""
        begin = time.monotonic()
        pushed = FilteredStream(self.stream, self.filters)
        fingerprint = Fingerprint(pushed) if self.has_fingerprint else None
        self.engine.update_weights(fingerprint or pushed, version)
        if fingerprint is not None:
            self.fingerprint = fingerprint.digest()
        self.last_report = PushReport(pushed.num_bytes, time.monotonic() - begin)
        return self.last_report
