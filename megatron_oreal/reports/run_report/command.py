"""Reads runs and writes one page about them, which is what `megatron-oreal report` does."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from megatron_oreal.observability.files import write_atomically
from megatron_oreal.reports.run_report.alarms import alarms_section, mark_alarms
from megatron_oreal.reports.run_report.experiments import Drawer, group_by_seed
from megatron_oreal.reports.run_report.page import render_report
from megatron_oreal.reports.run_report.runs import ReportedRun, read_reported_run, run_names
from megatron_oreal.reports.run_report.sections import Section, chart_sections
from megatron_oreal.reports.run_report.tables import (
    checkpoints_table,
    differences_table,
    environment_table,
    runs_table,
    settings_details,
)
from megatron_oreal.reports.viewer.page import check_out

BANDS = (
    "Runs that differ in their seeds alone are one curve, their mean; the band reaches from the lowest to the highest."
)


def write_report(paths: Sequence[Path], out: Path) -> list[str]:
    """Writes the page and returns lines for the user. Raises a one-line ValueError for a path without a run."""
    check_out(out)
    runs = [read_reported_run(path, name) for path, name in zip(paths, run_names(paths), strict=True)]
    page = render(runs).encode("ascii")
    write_atomically(out, page)
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    return [*notes, f"{out}: report of {count}, {len(page) / 1e6:.1f} MB"]


def render(runs: Sequence[ReportedRun]) -> str:
    drawer = Drawer.of(group_by_seed(runs))
    alarms, charts = alarms_section(runs), chart_sections(drawer)
    mark_alarms([chart for section in charts for chart in section.charts], runs)
    sections = [overview(runs), *([alarms] if alarms is not None else []), *charts, *closing_tables(runs)]
    lead = f"Written {datetime.now():%Y-%m-%d %H:%M}."
    if drawer.width > 1:
        lead += f" Each point of a curve is the mean of {drawer.width} steps."
    if any(len(one.runs) > 1 for one in drawer.experiments):
        lead += f" {BANDS}"
    return render_report(", ".join(run.name for run in runs), lead, sections)


def overview(runs: Sequence[ReportedRun]) -> Section:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return Section("Runs", " ".join(notes), [runs_table(runs)])


def closing_tables(runs: Sequence[ReportedRun]) -> list[Section]:
    checkpoints, environment = checkpoints_table(runs), environment_table(runs)
    sections = []
    if checkpoints is not None:
        sections.append(Section("Checkpoints", tables=[checkpoints]))
    settings = Section("Settings", tables=[settings_details(runs)])
    if len(runs) > 1:
        differences = differences_table(runs)
        settings.introduction = "These settings differ." if differences else "All settings are the same but run_dir."
        settings.tables.insert(0, differences or "")
    sections.append(settings)
    if environment is not None:
        sections.append(Section("Environment", "Each start of a run has a column.", [environment]))
    return sections
