"""Measures the seconds of a quickstart step, beside TRL's GRPOTrainer on the same task, model and batch.

    python tools/bench/bench_quickstart.py --rounds 2 --steps 15 --out result.json

Our run is `megatron-oreal train` with the quickstart's configuration: policy, reference and token-level reward model
with tensor parallelism over two processes, and all three models run in every step. TRL's run is one process that takes
the whole step as one batch, without gradient checkpointing, logging or checkpoints, and with a cheaper verifier than
ours. The benchmark measures every --trl-threads with every --trl-beta; the fastest with a reference model (beta > 0) is
the rival. The runs alternate, so that a busy machine slows all. After sampling they do different work: OREAL trains on
one correct and one incorrect sample of each mixed group, GRPO on all samples; the numbers of sequences are printed.

TRL may be in a separate environment, --trl-python, which needs click, torch, transformers, trl and datasets.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # TRL's environment may lack this package
    from megatron_oreal.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
NEVER = 1_000_000  # steps
Step = dict[str, float]  # step_seconds, num_generated_tokens, num_trained_sequences, mean_reward, phases/...
BOXED = re.compile(r"\\boxed\{(-?\d+)\}")
# Only an import of TRL shows whether it has the packages it needs.
TRL_VERSIONS = """
import json, sys, datasets, torch, transformers, trl
from trl import GRPOTrainer
json.dump({module.__name__: module.__version__ for module in (torch, transformers, trl, datasets)}, sys.stdout)
"""


@dataclass(slots=True, frozen=True)
class Variant:
    """The settings of a run of TRL."""

    threads: int
    beta: float
    attention: str  # transformers' attn_implementation

    @property
    def name(self) -> str:
        return f"TRL GRPO, {self.threads} thread(s), beta {self.beta:g}, {self.attention}"


@dataclass(slots=True)
class TrlRequest:
    """One run of TRL, given to its process as JSON."""

    model: str
    prompts: str
    out: str
    threads: int
    attention: str
    grpo: dict[str, Any]  # arguments of GRPOConfig


@dataclass(slots=True)
class Measured:
    """The steps of all rounds of one rival, without the warm-up steps."""

    name: str
    step_seconds: list[float] = field(default_factory=list)
    phase_seconds: dict[str, list[float]] = field(default_factory=dict)
    num_generated_tokens: list[float] = field(default_factory=list)  # a step
    num_trained_sequences: list[float] = field(default_factory=list)  # a step
    mean_rewards: list[float] = field(default_factory=list)
    round_medians: list[float] = field(default_factory=list)  # seconds a step
    loads: list[float] = field(default_factory=list)  # the machine's one-minute load average before each round

    @property
    def median(self) -> float:
        return statistics.median(self.step_seconds)

    def add(self, steps: Sequence[Step], load: float) -> None:
        for step in steps:
            self.step_seconds.append(step["step_seconds"])
            self.num_generated_tokens.append(step["num_generated_tokens"])
            self.num_trained_sequences.append(step["num_trained_sequences"])
            self.mean_rewards.append(step["mean_reward"])
            for name, seconds in step.items():
                if name.startswith("phases/"):
                    self.phase_seconds.setdefault(name.removeprefix("phases/"), []).append(seconds)
        self.round_medians.append(statistics.median(step["step_seconds"] for step in steps))
        self.loads.append(load)
        click.echo(f"  {self.name:41s} {self.round_medians[-1]:7.3f} s/step, load before {load:.1f}")


def load_average() -> float:
    return os.getloadavg()[0]


def run_process(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs a process. If it fails, prints the end of its standard error and raises ValueError."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        click.echo(done.stderr[-4000:], err=True)
        raise ValueError(f"{' '.join(command[:5])} ... ended with exit code {done.returncode}")


def own_environment() -> dict[str, str]:
    """Returns the environment of a user who sets no number of threads, so that the command line chooses it."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def prepare_task(config: TrainConfig, folder: Path) -> TrainConfig:
    """Returns the configuration with existing model and prompts: the quickstart's, or new ones from its commands."""
    path, prompts = ROOT / config.model.path, ROOT / config.data.prompts
    if (path / "config.json").is_file() and prompts.is_file():
        # A copy lets every run start from the same files, even if the quickstart's folder changes.
        path, prompts = Path(shutil.copytree(path, folder / "model")), Path(shutil.copy(prompts, folder))
    else:
        click.echo(f"{path} or {prompts} is missing: making them, with the supervised warm-up")
        path, prompts = warm_up(folder)
    model = config.model.model_copy(update={"path": path})
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update={"prompts": prompts})})


def warm_up(folder: Path) -> tuple[Path, Path]:
    """Makes prompts and a model that solves about half of them, because a random model gets no reward to learn from."""
    data, sft = folder / "data", folder / "sft"
    run_process([sys.executable, str(QUICKSTART / "prepare.py"), "--out", str(data)], own_environment())
    overrides = [f"model.path={data / 'model'}", f"data.examples={data / 'sft.jsonl'}", f"run_dir={sft}"]
    overrides += ["eval.prompts={}", f"checkpoint.every={NEVER}"]
    command = [sys.executable, "-m", "megatron_oreal.cli", "sft", str(QUICKSTART / "sft.yaml"), *overrides]
    run_process(command, own_environment())
    return sft / "hf", data / "train.jsonl"


def run_ours(config: TrainConfig, run_dir: Path, steps: int, seed: int) -> list[Step]:
    """Runs our trainer. Every step trains all models; the run does not evaluate, and saves after the last step only."""
    from megatron_oreal.observability.metrics import read_metrics

    overrides = [
        f"run_dir={run_dir}",
        f"num_steps={steps}",
        f"seed={seed}",
        f"model.path={config.model.path}",
        f"data.prompts={config.data.prompts}",
        "algorithm.policy_freeze_steps=0",
        "eval.prompts={}",
        f"checkpoint.every={NEVER}",
        "checkpoint.best_metric=''",
        "checkpoint.export_hf=false",
    ]
    command = [sys.executable, "-m", "megatron_oreal.cli", "train", str(QUICKSTART / "config.yaml"), *overrides]
    run_process(command, own_environment())
    records = [record for record in read_metrics(run_dir) if "time/rollout_seconds" in record]
    if any(record["train/skipped"] for record in records):
        raise ValueError("a step had no group with correct and incorrect samples: the model must be warmed up first")
    return [our_step(record) for record in records]


def our_step(record: Mapping[str, float]) -> Step:
    step = {
        "step_seconds": record["time/step_seconds"],
        "num_generated_tokens": record["rollout/num_tokens"],
        "num_trained_sequences": record["train/num_sequences"],
        "mean_reward": record["reward/mean"],
    }
    for name, value in record.items():
        phase = name.removeprefix("time/").removesuffix("_seconds")
        if name == f"time/{phase}_seconds" and phase != "step":
            step[f"phases/{phase}"] = value
    return step


def run_trl(config: TrainConfig, python: Path, folder: Path, steps: int, seed: int, how: Variant) -> list[Step]:
    file, out = folder / "request.json", folder / "trl.json"
    grpo = grpo_arguments(config, how.beta) | {"max_steps": steps, "seed": seed}
    model, prompts = str(config.model.path), str(config.data.prompts)
    file.write_text(json.dumps(asdict(TrlRequest(model, prompts, str(out), how.threads, how.attention, grpo))))
    environment = os.environ | {"OMP_NUM_THREADS": str(how.threads), "TOKENIZERS_PARALLELISM": "false"}
    run_process([str(python), str(Path(__file__).resolve()), "trl-worker", str(file)], environment)
    measured: list[Step] = json.loads(out.read_text())
    return measured


def exact_answer(completion: str, answer: str) -> float:
    found = BOXED.findall(completion)
    return float(bool(found) and found[-1] == answer)


def train_with_trl(request: TrlRequest) -> list[Step]:
    """Runs TRL, in TRL's process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(request.threads)
    seconds: list[float] = []
    batches: list[Step] = []

    def reward(completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards = [exact_answer(*pair) for pair in zip(completions, answer, strict=True)]
        num_tokens = sum(map(len, completion_ids))
        batches.append({"num_generated_tokens": num_tokens, "mean_reward": statistics.mean(rewards)})
        return rewards

    class Clock(TrainerCallback):  # type: ignore[misc]
        last = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            seconds.append(now - self.last)
            self.last = now

    rows = [json.loads(line) for line in Path(request.prompts).read_text().splitlines()]
    dataset = Dataset.from_list([{"prompt": row["prompt"][-1]["content"], "answer": row["answer"]} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                request.model, dtype=torch.float32, attn_implementation=request.attention
            ),
            processing_class=AutoTokenizer.from_pretrained(request.model),
            reward_funcs=reward,
            train_dataset=dataset,
            args=GRPOConfig(output_dir=folder, **request.grpo),
            callbacks=[Clock()],
        )
        trainer.train()
    assert len(seconds) == len(batches), "TRL generates once a step"
    size = request.grpo["per_device_train_batch_size"]
    return [
        batch | {"step_seconds": step, "num_trained_sequences": size}
        for step, batch in zip(seconds, batches, strict=True)
    ]


def grpo_arguments(config: TrainConfig, beta: float) -> dict[str, Any]:
    """Returns settings for one generation, one batch and one optimizer step a step, and nothing else."""
    optimizer, rollout = config.policy.optimizer, config.rollout
    return {
        "per_device_train_batch_size": config.data.prompts_per_step * rollout.group_size,
        "steps_per_generation": 1,
        "num_generations": rollout.group_size,
        "max_completion_length": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "beta": beta,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": optimizer.beta2,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip_grad,
        "disable_dropout": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "use_vllm": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def read_trl_versions(python: Path) -> dict[str, str]:
    """Raises ValueError when `python` cannot import TRL."""
    if not python.is_file():
        raise ValueError(f"--trl-python: {python} does not exist; give an interpreter with TRL")
    done = subprocess.run([str(python), "-c", TRL_VERSIONS], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{python} cannot import trl ({reason}): pip install -e '.[bench]', or give --trl-python")
    versions: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return versions


def describe(measured: Measured) -> str:
    rounds = ", ".join(f"{seconds:.3f}" for seconds in measured.round_medians)
    return (
        f"{measured.name}: {measured.median:.3f} s/step (rounds {rounds}); "
        f"{statistics.mean(measured.num_generated_tokens):.0f} tokens sampled and "
        f"{statistics.mean(measured.num_trained_sequences):.0f} sequences trained on a step, "
        f"mean reward {statistics.mean(measured.mean_rewards):.2f}"
    )


def print_result(ours: Measured, rivals: Sequence[Measured], best: Measured) -> None:
    click.echo(describe(ours))
    for phase, seconds in ours.phase_seconds.items():
        median = statistics.median(seconds)
        click.echo(f"  {phase:12s} {median:7.3f} s  {median / ours.median:6.1%}")
    for rival in rivals:
        click.echo(f"{describe(rival)}; ours/TRL {ours.median / rival.median:.3f}")
    click.echo(
        f"ours/TRL = {ours.median:.3f} s / {best.median:.3f} s = {ours.median / best.median:.3f} "
        f"({best.median / ours.median:.2f} x), TRL at its best with a reference model: {best.name}"
    )


def measure(
    config: TrainConfig, python: Path, variants: Sequence[Variant], rounds: int, steps: int, warmup: int
) -> tuple[Measured, list[Measured]]:
    """Runs the rivals alternately; returns our steps and those of TRL's variants."""
    ours, rivals = Measured(f"OREAL, {config.parallel.tensor} processes"), [Measured(how.name) for how in variants]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare_task(config, folder)
        for number in range(rounds):
            click.echo(f"round {number + 1} of {rounds}")
            load = load_average()
            ours.add(run_ours(config, folder / f"ours-{number}", steps, number)[warmup:], load)
            for how, rival in zip(variants, rivals, strict=True):
                load = load_average()
                rival.add(run_trl(config, python, folder, steps, number, how)[warmup:], load)
    return ours, rivals


def bench(
    config: TrainConfig, python: Path, variants: Sequence[Variant], rounds: int, steps: int, warmup: int
) -> dict[str, Any]:
    """Measures and prints; returns all results for the JSON line."""
    if steps <= warmup:
        raise ValueError(f"--steps must be > --warmup={warmup}, got {steps}")
    if all(how.beta <= 0 for how in variants):
        raise ValueError("--trl-beta needs a value > 0: ours has a reference model too")
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    trl_versions = read_trl_versions(python)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    click.echo(f"CPU, {cores} cores, float32, load {load_average():.1f}; ours {versions}; TRL's {trl_versions}")
    click.echo(
        f"{config.data.prompts_per_step} prompts x {config.rollout.group_size} samples of at most "
        f"{config.rollout.max_new_tokens} tokens; {rounds} rounds of {steps} steps each, the first {warmup} left out"
    )
    ours, rivals = measure(config, python, variants, rounds, steps, warmup)
    with_reference = [rival for how, rival in zip(variants, rivals, strict=True) if how.beta > 0]
    best = min(with_reference, key=lambda rival: rival.median)
    print_result(ours, rivals, best)
    return {
        "cores": cores,
        "versions": versions,
        "trl_versions": trl_versions,
        "rounds": rounds,
        "steps": steps,
        "warmup": warmup,
        "ours": asdict(ours),
        "trl": [asdict(rival) for rival in rivals],
        "best_trl": best.name,
        "ratio": ours.median / best.median,
    }


@click.group(invoke_without_command=True)
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(min=1), help="Ours, TRL, ours, TRL, ...")
@click.option("--steps", default=15, show_default=True, type=click.IntRange(min=2), help="Of every run.")
@click.option("--warmup", default=3, show_default=True, type=click.IntRange(min=1), help="First steps left out.")
@click.option("--trl-python", default=sys.executable, type=click.Path(path_type=Path), help="Interpreter that has TRL.")
@click.option("--trl-threads", "threads", multiple=True, default=(2, 1), show_default=True, type=click.IntRange(min=1))
@click.option("--trl-beta", "betas", multiple=True, type=float, help="Default: the quickstart's kl_coef, and 0.")
@click.option("--trl-attention", "attentions", multiple=True, default=("sdpa",), show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File for the JSON line.")
@click.pass_context
def main(
    context: click.Context,
    rounds: int,
    steps: int,
    warmup: int,
    trl_python: Path,
    threads: tuple[int, ...],
    betas: tuple[float, ...],
    attentions: tuple[str, ...],
    out: Path | None,
) -> None:
    """Prints the median seconds a step of our run, by phase, and of TRL's GRPOTrainer, and their ratio."""
    if context.invoked_subcommand is not None:
        return
    from megatron_oreal.config import TrainConfig, load_config

    try:
        config = load_config(TrainConfig, QUICKSTART / "config.yaml")
        choices = itertools.product(threads, betas or (config.algorithm.kl_coef, 0.0), attentions)
        variants = [Variant(*choice) for choice in choices]
        line = json.dumps(bench(config, trl_python.absolute(), variants, rounds, steps, warmup))
    except ValueError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    click.echo(line)
    if out is not None:
        out.write_text(line + "\n")


@main.command(hidden=True)
@click.argument("request", type=click.Path(exists=True, path_type=Path))
def trl_worker(request: Path) -> None:
    """Runs TRL's part in TRL's interpreter."""
    settings = TrlRequest(**json.loads(request.read_text()))
    Path(settings.out).write_text(json.dumps(train_with_trl(settings)))


if __name__ == "__main__":
    main()
