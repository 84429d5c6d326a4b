"""Evaluates the policy on held-out prompts between the steps of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from megatron_oreal.observability.files import write_atomically
from megatron_oreal.observability.metrics import Metrics
from megatron_oreal.rollout.records import sample_row
from megatron_oreal.run.run import Run
from megatron_oreal.types import Group


def evaluate(run: Run[Any, Any, Any], step: int) -> Metrics:
    """Returns `eval/<dataset>/greedy` and `eval/<dataset>/pass@1` (mean over prompts and samples), in [0, 1].

    Seeds do not depend on the step: two evaluations differ by the policy alone. A sample without a verdict counts as
    wrong here and in `eval/<dataset>/num_unjudged`.
    """
    metrics: Metrics = {}
    num_samples, seed = run.config.eval.num_samples, f"{run.config.seed}/eval"
    examples: dict[str, list[Group]] = {}
    for name, prompts in run.eval_prompts.items():
        greedy = run.sampler.sample(prompts, 1, replace(run.sampling, temperature=0.0), seed)
        metrics |= {f"eval/{name}/greedy": accuracy(greedy), f"eval/{name}/length": mean_length(greedy)}
        unjudged = num_unjudged(greedy)
        if num_samples:
            sampled = run.sampler.sample(prompts, num_samples, run.sampling, f"{seed}/{name}")
            metrics[f"eval/{name}/pass@1"] = accuracy(sampled)
            unjudged += num_unjudged(sampled)
        metrics[f"eval/{name}/num_unjudged"] = unjudged
        examples[name] = greedy[: run.config.eval.num_examples]
    write_examples(run, examples, step)
    return metrics


def accuracy(groups: list[Group]) -> float:
    samples = [sample for group in groups for sample in group.samples]
    return sum(sample.is_correct for sample in samples) / len(samples)


def mean_length(groups: list[Group]) -> float:
    lengths = [len(sample.response_ids) for group in groups for sample in group.samples]
    return sum(lengths) / len(lengths)


def num_unjudged(groups: list[Group]) -> int:
    return sum(not sample.is_judged for group in groups for sample in group.samples)


def write_examples(run: Run[Any, Any, Any], examples: dict[str, list[Group]], step: int) -> None:
    """Writes the first greedy answers to RUN_DIR/evaluations and TensorBoard; the first rank does."""
    if not run.layout.is_main:
        return
    rows = [
        {"dataset": name} | sample_row(group, group.samples[0]) for name, groups in examples.items() for group in groups
    ]
    folder = run.config.run_dir / "evaluations"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"step_{step:06d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for number, row in enumerate(rows):
        run.log.text(f"eval/{row['dataset']}/{number}", f"{row['prompt']}\n{row['response']}\n{row['status']}", step)
