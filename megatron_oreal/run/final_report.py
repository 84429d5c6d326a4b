"""Writes RUN_DIR/report.html at the end of a run."""

from __future__ import annotations

from typing import Any

from megatron_oreal.reports.run_report.command import write_report
from megatron_oreal.run.run import Run

FILE = "report.html"


def write_final_report(run: Run[Any, Any, Any]) -> None:
    """Writes the page that `megatron-oreal report RUN_DIR` writes. If that fails, the run only logs one line."""
    if not run.layout.is_main:
        return
    out = run.config.run_dir / FILE
    try:
        write_report([run.config.run_dir], out)
    except Exception as error:  # noqa: BLE001  # the run has succeeded, so no error of its page may end it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        run.progress.note(f"the report was not written ({reason}); `megatron-oreal report` writes it")
        return
    run.log.upload(out)
    run.progress.note(f"the report of the run is {out}")
