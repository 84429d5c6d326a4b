"""Writes RUN_DIR/alarms.jsonl, with one line for each alarm that fires or ends, and logs the alarm."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megatron_oreal.config import MachineAlarms
from megatron_oreal.observability.alarms import AlarmEvent, Alarms
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.observability.metrics import as_number, read_metrics
from megatron_oreal.types import Notify

FILE = "alarms.jsonl"


class AlarmLog:
    """The alarms of a run that begins or resumes at `start_step`.

    The lines of later steps are dropped, because the run repeats these steps. Only the first rank has an alarm log.
    """

    def __init__(self, run_dir: Path, start_step: int, config: MachineAlarms, notify: Notify) -> None:
        self.path, self.notify, self.alarms = run_dir / FILE, notify, Alarms(config)
        kept = [event for event in read_alarms(run_dir) if event.step < start_step]
        if self.path.is_file():
            write_atomically(self.path, "".join(map(encode, kept)))
        self.alarms.replay((record for record in read_metrics(run_dir) if record["step"] < start_step), kept)
        if lasting := self.alarms.lasting:
            notify(f"alarms that last since before step {start_step}: {', '.join(lasting)}")

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Checks the record of `step`; values are numbers or one-element tensors."""
        events = self.alarms.observe({name: as_number(value) for name, value in metrics.items()} | {"step": step})
        if not events:
            return
        for event in events:
            self.notify(event.line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(encode, events)))
            file.flush()
            os.fsync(file.fileno())


def encode(event: AlarmEvent) -> str:
    return json.dumps(asdict(event)) + "\n"


def read_alarms(run_dir: Path) -> list[AlarmEvent]:
    """Reads the events of alarms.jsonl; leaves out torn or damaged lines."""
    path = run_dir / FILE
    events = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            events.append(AlarmEvent(**json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            continue
    return events
