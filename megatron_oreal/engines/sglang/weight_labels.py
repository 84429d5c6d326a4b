"""Labels the weights of a server by the run that sent them and the version, so that runs do not confuse them.

Example: "3f2a9c01d4e5b677/12" means version 12 of the weights of run 3f2a9c01d4e5b677. A run is here one engine object;
a restarted run has another id, and sends its weights before it generates.
"""

from __future__ import annotations

import secrets

WEIGHTS_FROM_DISK = "default"  # the label of weights that the server has read from disk


def new_run_id() -> str:
    return secrets.token_hex(8)


def label_of(run_id: str, version: int) -> str:
    """Returns the label; without a run id, only the version number."""
    return f"{run_id}/{version}" if run_id else str(version)


def run_of(label: str) -> str:
    """Returns the id of the run that sent these weights; empty for weights from disk."""
    run_id, slash, _ = label.rpartition("/")
    return run_id if slash else ""


def version_of(label: str) -> int:
    """Returns the version; weights from disk have version 0. Raises ValueError for a label that no run has written."""
    return 0 if label == WEIGHTS_FROM_DISK else int(label.rpartition("/")[2])
