"""Defines the result of a check, which is ok, a warning or an error with a fix, and how results are printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from megatron_oreal.observability.printable import printable

Status = Literal["ok", "warning", "error"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "error")  # in ascending severity
MAX_HOSTS = 4  # named in one line
NUMBER = re.compile(r"\d+(\.\d+)*")
SCHEMA = 1  # The version of the JSON format. Renaming or removing a field raises it.


@dataclass(frozen=True, slots=True)
class Finding:
    check: str  # a short name, such as gpus
    status: Status
    message: str  # the observation
    fix: str = ""  # what to do about it; empty if the status is ok
    hosts: tuple[str, ...] = ()  # the hosts concerned; empty means the whole job

    def line(self, num_hosts: int) -> str:
        """Returns the finding as one line. Names hosts if only some of several are concerned."""
        named = f" [{', '.join(self.hosts[:MAX_HOSTS])}{', ...' if self.hosts[MAX_HOSTS:] else ''}]"
        where = named if 0 < len(self.hosts) < num_hosts else ""
        text = f"{self.message}; {self.fix}" if self.fix else self.message
        return printable(f"{self.status:8}{self.check:14}{' '.join(text.split())}{where}")


@dataclass(frozen=True, slots=True)
class Report:
    findings: Sequence[Finding]
    num_ranks: int
    hosts: Sequence[str]
    seconds: float  # the duration of the checks

    @property
    def status(self) -> Status:
        """Returns the most severe status of the findings."""
        return max((finding.status for finding in self.findings), key=STATUSES.index, default="ok")

    @property
    def exit_code(self) -> int:
        return 1 if self.status == "error" else 0

    def text(self) -> str:
        """Returns one line per finding, and a last line that counts them."""
        counts = {status: sum(finding.status == status for finding in self.findings) for status in STATUSES}
        ranks = f"{self.num_ranks} process{'es' * (self.num_ranks > 1)}"
        hosts = f"{len(self.hosts)} host{'s' * (len(self.hosts) > 1)}"
        words = f"{counts['ok']} ok, {counts['warning']} warnings, {counts['error']} errors"
        last = f"doctor: {words} ({ranks} on {hosts}, {self.seconds:.1f} s)"
        return "\n".join([*(finding.line(len(self.hosts)) for finding in self.findings), last])

    def json(self) -> str:
        """Returns one JSON object on one line."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "status": self.status,
                "num_ranks": self.num_ranks,
                "hosts": list(self.hosts),
                "seconds": round(self.seconds, 3),
                "findings": [asdict(finding) for finding in self.findings],
            }
        )


def ok(check: str, message: str) -> Finding:
    return Finding(check, "ok", message)


def warning(check: str, message: str, fix: str) -> Finding:
    return Finding(check, "warning", message, fix)


def error(check: str, message: str, fix: str) -> Finding:
    return Finding(check, "error", message, fix)


def of_mistake(check: str, mistake: BaseException) -> Finding:
    """Makes an error from an exception whose line names the field and, after a semicolon or a second colon, the fix."""
    text = str(mistake)
    message, _, fix = text.partition("; ")
    if not fix and text.count(": ") > 1:
        message, _, fix = text.rpartition(": ")
    return Finding(check, "error", message, fix or "change what it names")


def merged(by_host: Iterable[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """Merges the findings that several hosts share into one, with the names of the hosts.

    Warnings and errors must be identical; findings that are ok may differ in their numbers, and those of the first host
    are shown.
    """
    shown: dict[tuple[object, ...], Finding] = {}
    for host, findings in by_host:
        for finding in findings:
            words = NUMBER.sub("0", finding.message) if finding.status == "ok" else finding.message
            key = (finding.check, finding.status, words, finding.fix)
            first = shown.setdefault(key, finding)
            if host not in first.hosts:
                shown[key] = replace(first, hosts=(*first.hosts, host))
    return list(shown.values())
