"""What a check has found: ok, a warning or an error, each of the last two with the fix. How they are printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from megatron_oreal.observability.printable import printable

Status = Literal["ok", "warning", "error"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "error")  # from the mildest to the gravest
MAX_HOSTS = 4  # that a line names
NUMBER = re.compile(r"\d+(\.\d+)*")
SCHEMA = 1  # The version of the JSON: a field that is renamed or removed raises it.


@dataclass(frozen=True, slots=True)
class Finding:
    check: str  # a short name, such as gpus
    status: Status
    message: str  # what is the case
    fix: str = ""  # what to do about it; empty where all is well
    hosts: tuple[str, ...] = ()  # where it is so; empty: in the whole job

    def line(self, num_hosts: int) -> str:
        """Returns the finding as one line. Hosts are named where some of several are meant."""
        named = f" [{', '.join(self.hosts[:MAX_HOSTS])}{', ...' if self.hosts[MAX_HOSTS:] else ''}]"
        where = named if 0 < len(self.hosts) < num_hosts else ""
        text = f"{self.message}; {self.fix}" if self.fix else self.message
        return printable(f"{self.status:8}{self.check:14}{' '.join(text.split())}{where}")


@dataclass(frozen=True, slots=True)
class Report:
    findings: Sequence[Finding]
    num_ranks: int
    hosts: Sequence[str]
    seconds: float  # that the checks took

    @property
    def status(self) -> Status:
        """The gravest status that was found."""
        return max((finding.status for finding in self.findings), key=STATUSES.index, default="ok")

    @property
    def exit_code(self) -> int:
        return 1 if self.status == "error" else 0

    def text(self) -> str:
        """Returns a line a finding, and a last one that counts them."""
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
    """Makes an error of an exception whose line names the field, and after a semicolon or a second colon the fix."""
    text = str(mistake)
    message, _, fix = text.partition("; ")
    if not fix and text.count(": ") > 1:
        message, _, fix = text.rpartition(": ")
    return Finding(check, "error", message, fix or "change what it names")


def merged(by_host: Iterable[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """Makes one finding of those that several hosts share, with the names of the hosts.

    Warnings and errors must be the same word for word; what is ok may differ in its numbers, and those of the first
    host are shown.
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
