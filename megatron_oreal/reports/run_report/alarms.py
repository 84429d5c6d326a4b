"""Shows the alarms of the runs: a table of those that fired, and marks in the charts of their metrics."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oreal.observability.alarms import AlarmEvent
from megatron_oreal.reports.run_report.charts import Chart, Mark
from megatron_oreal.reports.run_report.runs import ReportedRun
from megatron_oreal.reports.run_report.sections import Section
from megatron_oreal.reports.run_report.tables import html_table

INTRODUCTION = (
    "docs/alarms.md says what each alarm means and what to do. A dashed line in a chart marks where one fired."
)


def alarms_section(runs: Sequence[ReportedRun]) -> Section | None:
    """Lists the alarms that fired, with the step at which each ended; None if no alarm fired."""
    rows = [
        [run.name, event.step, ending(run, event), title(event), event.line.partition(": alarm ")[2]]
        for run in runs
        for event in run.alarms
        if event.event == "fired"
    ]
    if not rows:
        return None
    return Section("Alarms", INTRODUCTION, [html_table(("run", "from step", "to step", "alarm", "in words"), rows)])


def mark_alarms(charts: Sequence[Chart], runs: Sequence[ReportedRun]) -> None:
    """Marks in each chart the steps at which an alarm about one of its metrics fired."""
    for chart in charts:
        chart.marks = [
            Mark(event.step, f"{run.name}: {title(event)}" if len(runs) > 1 else title(event))
            for run in runs
            for event in run.alarms
            if event.event == "fired" and event.metric in chart.metrics
        ]


def ending(run: ReportedRun, fired: AlarmEvent) -> int | str:
    """Returns the step at which an alarm ended, "a resume" if it fired again instead, or else "it lasts"."""
    after = run.alarms[run.alarms.index(fired) + 1 :]
    same = [event for event in after if (event.alarm, event.subject) == (fired.alarm, fired.subject)]
    if not same:
        return "it lasts"
    return same[0].step if same[0].event == "ended" else "a resume"


def title(event: AlarmEvent) -> str:
    return f"{event.alarm} ({event.subject})" if event.subject else event.alarm
