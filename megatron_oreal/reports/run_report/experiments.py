"""Groups runs that differ only in their seeds, and draws one metric or one summary of each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_oreal.reports.run_report.charts import Chart, Curve, Series, bucket_width, over_seeds, thinned
from megatron_oreal.reports.run_report.runs import ReportedRun

Layers = Callable[[ReportedRun], dict[str, Curve]]  # Returns {label: curve} for a run.


@dataclass(slots=True, frozen=True)
class Experiment:
    """Runs that differ only in their seeds; in most reports, each experiment has one run."""

    label: str
    runs: list[ReportedRun]


def group_by_seed(runs: Sequence[ReportedRun]) -> list[Experiment]:
    groups: dict[str, list[ReportedRun]] = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    return [Experiment(label_of(group), group) for group in groups.values()]


def label_of(group: Sequence[ReportedRun]) -> str:
    if len(group) == 1:
        return group[0].name
    seeds = ", ".join(str(run.settings.get("seed")) for run in group)
    return f"{group[0].name} (mean of {len(group)} seeds: {seeds})"


@dataclass(slots=True, frozen=True)
class Drawer:
    """Draws charts of all experiments with the same colours and the same thinning."""

    experiments: list[Experiment]
    width: int  # number of steps that a point averages

    @staticmethod
    def of(experiments: list[Experiment]) -> Drawer:
        return Drawer(experiments, bucket_width(run.last_step for one in experiments for run in one.runs))

    def metrics(self, title: str, metrics: Sequence[tuple[str, str]], note: str = "") -> Chart | None:
        """Draws metrics, given as (name, label), of all experiments in one chart; None if no run has any."""
        series = []
        present = [(name, label) for name, label in metrics if self.has(name)]
        for number, (name, label) in enumerate(present):
            for index, experiment in enumerate(self.experiments):
                one = self.mean(experiment, partial(curve_of, metric=name), label if len(present) > 1 else "")
                if one is not None:
                    series.append(self.coloured(one, index, number))
        if not series:
            return None
        return Chart(title, series, note=note, metrics=tuple(name for name, _ in present))

    def layers(self, title: str, of_run: Layers, note: str = "", order: Sequence[str] = ()) -> Chart | None:
        """Draws several curves of each run, such as one for each data set."""
        labels = ordered({label for one in self.experiments for run in one.runs for label in of_run(run)}, order)
        series = []
        for number, label in enumerate(labels):
            for index, experiment in enumerate(self.experiments):
                one = self.mean(experiment, partial(layer_of, of_run=of_run, label=label), label)
                if one is not None:
                    series.append(self.coloured(one, index, number))
        return Chart(title, series, note=note) if series else None

    def stacks(self, title: str, of_run: Layers, note: str = "", order: Sequence[str] = ()) -> list[Chart]:
        """Draws one stack for each experiment."""
        charts = []
        for experiment in self.experiments:
            stacks = [filled(of_run(run)) for run in experiment.runs]
            labels = ordered({label for stack in stacks for label in stack}, order)
            series = []
            for number, label in enumerate(labels):
                # For a run without this layer, the layer is 0 at the steps of the run's other layers.
                curves = [stack.get(label) or empty_layer(stack) for stack in stacks]
                one = over_seeds(label, [thinned(curve, self.width) for curve in curves if curve])
                if one is not None:
                    series.append(Series(label, one.values, colour=number))
            if series:
                owner = f": {experiment.label}" if len(self.experiments) > 1 else ""
                charts.append(Chart(f"{title}{owner}", series, "stacked", note))
        return charts

    def mean(self, experiment: Experiment, curve: Callable[[ReportedRun], Curve], label: str) -> Series | None:
        curves = [thinned(curve(run), self.width) for run in experiment.runs]
        owner = experiment.label if len(self.experiments) > 1 or not label else ""
        return over_seeds(": ".join(filter(None, [owner, label])), [found for found in curves if found])

    def coloured(self, series: Series, experiment: int, number: int) -> Series:
        """Gives each of several experiments a colour and each metric dashes; a single one has a colour per metric."""
        if len(self.experiments) > 1:
            series.colour, series.dashes = experiment, number
        else:
            series.colour = number
        return series

    def has(self, metric: str) -> bool:
        return any(metric in run.metric_names for one in self.experiments for run in one.runs)


def curve_of(run: ReportedRun, metric: str) -> Curve:
    return run.curve(metric)


def layer_of(run: ReportedRun, of_run: Layers, label: str) -> Curve:
    return of_run(run).get(label, {})


def ordered(labels: set[str], order: Sequence[str]) -> list[str]:
    return [label for label in order if label in labels] + sorted(labels - set(order))


def filled(layers: dict[str, Curve]) -> dict[str, Curve]:
    """Fills in 0 for each layer that a step lacks."""
    steps = sorted({step for curve in layers.values() for step in curve})
    return {label: {step: curve.get(step, 0.0) for step in steps} for label, curve in layers.items()}


def empty_layer(stack: dict[str, Curve]) -> Curve:
    return dict.fromkeys(next(iter(stack.values()), {}), 0.0)
