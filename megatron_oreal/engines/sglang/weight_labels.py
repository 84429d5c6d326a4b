"""What a server calls its weights: the run that has sent them, and the version, so that no run takes another's.

Example: "3f2a9c01d4e5b677/12" are the weights of version 12 of the run 3f2a9c01d4e5b677. An engine is a run here: the
same run, started again, has another id, and sends its weights before it generates.
"""

from __future__ import annotations

import secrets

WEIGHTS_FROM_DISK = "default"  # what a server calls the weights that it has read from disk


def new_run_id() -> str:
    return secrets.token_hex(8)


def label_of(run_id: str, version: int) -> str:
    """Returns the label; without a run id, the number alone."""
    return f"{run_id}/{version}" if run_id else str(version)


def run_of(label: str) -> str:
    """Returns the id of the run that has sent these weights; nothing for those that a server has read from disk."""
    run_id, slash, _ = label.rpartition("/")
    return run_id if slash else ""


def version_of(label: str) -> int:
    """Returns the version; weights from disk are version 0. Raises ValueError for what no run has written."""
    return 0 if label == WEIGHTS_FROM_DISK else int(label.rpartition("/")[2])
