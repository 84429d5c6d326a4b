"""Writes the report's tables: the runs, their checkpoints, the settings that differ, and the runs' environments."""

from __future__ import annotations

import html
from collections.abc import Sequence

from megatron_oreal.reports.curves import format_cell
from megatron_oreal.reports.run_report.runs import ReportedRun, SavedCheckpoint

SHARE_AT_THE_END = 0.1  # the last reward is the mean over this share of the steps


def html_table(header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """Writes a table and escapes every cell, so that no text can become code."""
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(html_cell, row))}</tr>" for row in rows)
    titled = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{titled}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_cell(value: object) -> str:
    kind = ' class="number"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"<td{kind}>{html.escape(format_cell(value))}</td>"


def runs_table(runs: Sequence[ReportedRun]) -> str:
    header = (
        "run",
        "state",
        "steps",
        "reward, last tenth",
        "best held-out accuracy",
        "trained tokens",
        "hours",
    )
    return html_table(header, [run_row(run) for run in runs])


def run_row(run: ReportedRun) -> list[object]:
    planned = run.settings.get("num_steps")
    is_finished = planned is not None and run.last_step >= int(str(planned)) - int(not evaluates(run))
    rewards = list(run.curve("reward/mean").values())
    tail = rewards[-max(1, int(len(rewards) * SHARE_AT_THE_END)) :]
    best = best_evaluation(run)
    seconds = sum(record.get("time/step_seconds", 0.0) for record in run.records)
    return [
        run.name,
        "finished" if is_finished else f"at step {run.last_step} of {planned}",
        len(run.records) if not evaluates(run) else run.last_step,
        sum(tail) / len(tail) if tail else None,
        best,
        int(sum(run.curve("train/num_tokens").values())),
        round(seconds / 3600, 2),
    ]


def evaluates(run: ReportedRun) -> bool:
    """Returns whether the run evaluates: its last record, of step num_steps, then holds an evaluation only."""
    return any(name.startswith("eval.prompts.") for name in run.settings)


def best_evaluation(run: ReportedRun) -> str | None:
    found = []
    for name in sorted(run.metric_names):
        if name.startswith("eval/") and name.endswith(("/greedy", "/pass@1")) and (curve := run.curve(name)):
            step = max(curve, key=lambda at: (curve[at], -at))
            found.append(f"{name.removeprefix('eval/')} {curve[step]:.4g} at step {step:g}")
    return "; ".join(found) or None


def checkpoints_table(runs: Sequence[ReportedRun]) -> str | None:
    rows = [checkpoint_row(run, saved) for run in runs for saved in run.checkpoints]
    return html_table(("run", "step", "evaluation", "", "folder"), rows) if rows else None


def checkpoint_row(run: ReportedRun, saved: SavedCheckpoint) -> list[object]:
    metric = str(run.settings.get("checkpoint.best_metric") or "")
    scores = {one.step: one.evaluation[metric] for one in run.checkpoints if metric in one.evaluation}
    is_best = saved.step in scores and scores[saved.step] == max(scores.values())
    shown = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in saved.evaluation.items())
    return [run.name, saved.step, shown or None, f"best by {metric}" if is_best else "", str(saved.path)]


def differences_table(runs: Sequence[ReportedRun]) -> str | None:
    """Lists the settings that differ between the runs; None if there are none."""
    names = sorted({name for run in runs for name in run.settings} - {"run_dir"})
    rows = []
    for name in names:
        values = [setting(run, name) for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return html_table(("setting", *(run.name for run in runs)), rows) if rows else None


def setting(run: ReportedRun, name: str) -> str:
    return repr(run.settings[name]) if name in run.settings else "not there"


def environment_table(runs: Sequence[ReportedRun]) -> str | None:
    """Writes one column per start of a run; a resumed run has several."""
    starts = [(run, start) for run in runs for start in run.starts]
    names = list(dict.fromkeys(name for _, start in starts for name in start))
    rows = [[name, *(str(start.get(name, "")) for _, start in starts)] for name in names]
    header = ["", *(f"{run.name}, from step {start.get('start_step', '?')}" for run, start in starts)]
    return html_table(header, rows) if rows else None


def settings_details(runs: Sequence[ReportedRun]) -> str:
    """Lists all settings of each run in a collapsed element."""
    parts = []
    for run in runs:
        text = "\n".join(f"{name}: {value!r}" for name, value in run.settings.items())
        summary = f"<summary>All settings of {html.escape(run.name)}</summary>"
        parts.append(f"<details>{summary}<pre>{html.escape(text)}</pre></details>")
    return "".join(parts)
