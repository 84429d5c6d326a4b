"""Defines what the report shows: its sections in order, with the metrics of each chart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from megatron_oreal.reports.run_report.charts import Chart, histogram
from megatron_oreal.reports.run_report.experiments import Drawer
from megatron_oreal.reports.run_report.rollouts import DIFFICULTIES, GROUP_KINDS, RolloutSummary
from megatron_oreal.reports.run_report.throughput import MFU_FORMULA, NO_PEAK, phase_seconds, update_flops, utilization

Metrics = Sequence[tuple[str, str]]  # (name, label)


@dataclass(slots=True)
class Section:
    title: str
    introduction: str = ""
    tables: list[str] = field(default_factory=list)  # HTML
    charts: list[Chart] = field(default_factory=list)

    def add(self, *charts: Chart | None) -> None:
        self.charts += [chart for chart in charts if chart is not None]

    @property
    def is_empty(self) -> bool:
        return not self.tables and not self.charts


def chart_sections(drawer: Drawer) -> list[Section]:
    """Returns the sections that consist of charts, without empty ones."""
    sections = [
        learning(drawer),
        pass_rates(drawer),
        losses(drawer),
        mismatch(drawer),
        token_weights(drawer),
        lengths(drawer),
        verdicts(drawer),
        seconds(drawer),
    ]
    drawn = {name for section in sections for chart in section.charts for name in chart.metrics}
    sections.append(everything_else(drawer, drawn))
    return [section for section in sections if not section.is_empty]


def learning(drawer: Drawer) -> Section:
    section = Section("Learning", "Rewards of the samples that the run trained on, and accuracy on held-out prompts.")
    section.add(
        drawer.metrics("Reward: share of correct samples", [("reward/mean", "")]),
        drawer.metrics("Reward values", named("reward/value_", "mean", "min", "max")),
    )
    for dataset in sorted(names_of(drawer, r"eval/(.+)/(?:greedy|pass@1)")):
        kinds = [(f"eval/{dataset}/greedy", "greedy"), (f"eval/{dataset}/pass@1", "sampled (pass@1)")]
        section.add(drawer.metrics(f"Held-out accuracy: {dataset}", kinds))
    at_least_one = sorted(names_of(drawer, r"reward/pass_at_(\d+)"), key=int)
    section.add(
        drawer.metrics(
            "Prompts solved by at least one of n samples",
            [
                *((f"reward/pass_at_{n}", f"n = {n}") for n in at_least_one),
                ("reward/pass_at_group_size", "whole group"),
            ],
        )
    )
    return section


def pass_rates(drawer: Drawer) -> Section:
    section = Section("Pass rates by data set and difficulty", sampled_steps(drawer))
    unknown = "Only where data.prompts has pass rates: `megatron-oreal passrate` measures them."
    section.add(
        drawer.layers("Share of correct samples by data set", lambda run: run.rollouts.by_source),
        drawer.layers(
            "Share of correct samples by difficulty",
            lambda run: run.rollouts.by_difficulty,
            f"Difficulty is the pass rate that was measured before training. {unknown}",
            [label for _, label in DIFFICULTIES],
        ),
    )
    section.add(
        *drawer.stacks(
            "Groups by their own pass rate",
            lambda run: run.rollouts.group_kinds,
            "Share of the groups. Groups in which no or every sample is correct teach most algorithms nothing.",
            GROUP_KINDS,
        )
    )
    return section


def losses(drawer: Drawer) -> Section:
    section = Section("Policy, reward model and critic")
    section.add(
        drawer.metrics("Loss of the policy", [("policy/loss", "loss"), *parts(drawer, "policy/loss_")]),
        drawer.metrics("Entropy of the policy (nats a token)", [("policy/entropy", "")]),
        drawer.metrics("KL divergence from the reference", [("policy/kl", "")]),
        drawer.metrics("Gradient norm", models(drawer, "grad_norm")),
        drawer.metrics("Learning rate", models(drawer, "lr")),
        drawer.metrics("Reward model", [("reward_model/accuracy", "accuracy"), ("reward_model/loss", "loss")]),
        drawer.metrics("Critic", [("critic/loss", "loss"), ("critic/explained_variance", "explained variance")]),
    )
    return section


def mismatch(drawer: Drawer) -> Section:
    section = Section(
        "Engine against trainer, and staleness",
        "The mismatch compares the log-probs of the engine that sampled with those of the trainer for the same tokens.",
    )
    section.add(
        drawer.metrics("Mismatch: mean |difference of log-probs|", [("policy/mismatch", "")]),
        drawer.metrics("Mismatch: largest difference", [("policy/mismatch_max", "")]),
        drawer.metrics("Mismatch as KL divergence", [("policy/mismatch_kl_k1", "k1"), ("policy/mismatch_kl_k3", "k3")]),
        drawer.metrics("Importance weights", parts(drawer, "policy/importance")),
        drawer.metrics("Age of the samples in steps", named("rollout/staleness_", "mean", "max")),
        drawer.metrics(
            "Responses given up, carried and resumed",
            named("rollout/num_", "given_up", "carried", "resumed", "restarted"),
        ),
    )
    return section


def token_weights(drawer: Drawer) -> Section:
    section = Section(
        "Token weights",
        "OREAL's reward model gives each token a weight. Histograms need logging.rollout_tokens, which records tokens.",
    )
    section.add(drawer.metrics("Token weights", parts(drawer, "policy/weight_")))
    section.add(*histograms(drawer, "Histogram of token weights", lambda summary: summary.weights, "weight"))
    return section


def lengths(drawer: Drawer) -> Section:
    section = Section("Response lengths")
    section.add(
        drawer.metrics(
            "Tokens of a response",
            [
                ("rollout/length_mean", "mean"),
                ("rollout/length_median", "median"),
                ("rollout/length_nine_tenths", "nine tenths are shorter"),
                ("rollout/length_max", "longest"),
            ],
        ),
        drawer.metrics("Share of responses cut at the length limit", [("rollout/length_limit_share", "")]),
        drawer.metrics("Length by correctness", named("rollout/length_", "correct_mean", "incorrect_mean")),
        drawer.metrics("Repetition", named("rollout/repetition_", "mean", "max")),
    )
    section.add(*histograms(drawer, "Histogram of lengths", lambda summary: summary.lengths, "tokens", low=0.0))
    return section


def verdicts(drawer: Drawer) -> Section:
    section = Section("Verifier")
    section.add(
        *drawer.stacks("Verdicts", lambda run: run.rollouts.statuses, "Share of the samples.", ("correct", "incorrect"))
    )
    section.add(
        drawer.metrics(
            "Samples without a decision",
            named("verifier/", "timeout", "crash", "judge_failed", "reward_failed"),
            "They are never counted as wrong.",
        ),
        drawer.metrics("Answers not found or rejected", named("verifier/", "no_answer", "rejected")),
        drawer.metrics("Seconds of verification", named("time/verifier/", "seconds", "seconds_after_generation")),
    )
    return section


def seconds(drawer: Drawer) -> Section:
    section = Section("Time", "Where the seconds of a step went, and how much came out of them.")
    phases = drawer.stacks("Seconds of a step", phase_seconds)
    for chart in phases:
        chart.metrics = tuple(f"time/{series.label.replace(' ', '_')}_seconds" for series in chart.series)
    section.add(*phases)
    section.add(
        drawer.metrics("Memory of a rank (GiB), the largest", named("time/memory/", "host_gib", "gpu_gib")),
        drawer.metrics(
            "Tokens a second",
            [("time/rollout_tokens_per_second", "rollout"), ("time/update_tokens_per_second", "update")],
        ),
        drawer.layers("Model FLOPs utilization of the update", utilization, f"{MFU_FORMULA} {NO_PEAK}"),
        drawer.layers("Teraflops a second of the update, a process", update_flops, MFU_FORMULA),
    )
    return section


def everything_else(drawer: Drawer, drawn: set[str]) -> Section:
    section = Section("All other metrics")
    phases = re.compile(r"time/[a-z_]+_seconds")
    names = {name for one in drawer.experiments for run in one.runs for name in run.metric_names}
    for name in sorted(names - drawn):
        if not phases.fullmatch(name):
            section.add(drawer.metrics(name, [(name, "")]))
    return section


def histograms(
    drawer: Drawer,
    title: str,
    values_of: Callable[[RolloutSummary], dict[int, list[float]]],
    x_label: str,
    low: float | None = None,
) -> list[Chart]:
    """Draws one chart for each experiment, of its first run, with a histogram for each step of `values_of`.

    All histograms of a chart reach from `low`, or from the smallest value, to the largest value.
    """
    charts = []
    for experiment in drawer.experiments:
        run = experiment.runs[0]
        found = {step: values for step, values in values_of(run.rollouts).items() if values}
        if found:
            everything = [value for values in found.values() for value in values]
            limits = (min(everything) if low is None else low, max(everything))
            series = [histogram(f"step {step}", values, *limits) for step, values in found.items()]
            for number, one in enumerate(series):
                one.colour = number
            note = "Share of each of 30 equal parts."
            charts.append(Chart(f"{title}: {run.name}", series, "bars", note, x_label))
    return charts


def sampled_steps(drawer: Drawer) -> str:
    counts = [(len(run.rollouts.steps), run.rollouts.num_steps) for one in drawer.experiments for run in one.runs]
    read, known = max(counts, key=lambda count: count[1] - count[0])
    return f"Read from the samples of {read} of {known} steps." if read < known else ""


def named(prefix: str, *names: str) -> Metrics:
    return [(f"{prefix}{name}", name.replace("_", " ")) for name in names]


def parts(drawer: Drawer, prefix: str) -> Metrics:
    """Returns all metrics whose names begin with the prefix, with the rest of the name as label."""
    rest = names_of(drawer, f"{re.escape(prefix)}(.*)")
    return [(f"{prefix}{name}", name.strip("_").replace("_", " ") or "value") for name in sorted(rest)]


def models(drawer: Drawer, name: str) -> Metrics:
    return [(f"{model}/{name}", model.replace("_", " ")) for model in ("policy", "reward_model", "critic")]


def names_of(drawer: Drawer, pattern: str) -> set[str]:
    names: Iterable[str] = {name for one in drawer.experiments for run in one.runs for name in run.metric_names}
    return {match[1] for name in names if (match := re.fullmatch(pattern, name))}
