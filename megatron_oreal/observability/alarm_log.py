"""The alarms of a run on disk: RUN_DIR/alarms.jsonl has a line where an alarm fires and one where it clears.

{"step": 40, "alarm": "entropy", "is_firing": true, "metric": "policy/entropy", "value": 0.01, "threshold": 0.05,
 "text": "..."}
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "alarms.jsonl"


@dataclass(slots=True, frozen=True)
class AlarmEvent:
    step: int
    alarm: str  # its name, which is the setting alarms.<name>
    is_firing: bool  # False: it clears
    metric: str  # what it watches
    value: float
    threshold: float
    text: str  # the line of the log

    def encode(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def read_alarms(run_dir: Path) -> list[AlarmEvent]:
    """Returns the events of a run in their order; a torn or damaged line is left out."""
    path = run_dir / FILE
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            found.append(AlarmEvent(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def firing(events: list[AlarmEvent]) -> dict[str, AlarmEvent]:
    """Returns the alarms that have fired and not cleared, by name."""
    last = {event.alarm: event for event in events}
    return {name: event for name, event in last.items() if event.is_firing}
