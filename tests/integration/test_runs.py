"""Whole runs through the command line: records, checkpoints, kill and resume, layouts."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oreal.observability.alarm_log import read_alarms
from megatron_oreal.weights.families import parameters, read_architecture
from megatron_oreal.weights.torch_dist_reader import TorchDistReader

Metrics = dict[str, Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture command_line


def records(run_dir: Path) -> list[Metrics]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(run_dir: Path) -> list[Metrics]:
    return [{name: v for name, v in r.items() if not name.startswith("time/")} for r in records(run_dir)]


@pytest.fixture(scope="module")
def unbroken(train_config: Metrics, command_line: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    done = command_line("train", train_config | {"run_dir": str(folder / "run")}, folder / "config.yaml")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_leaves_its_records(unbroken: Path, train_config: Metrics) -> None:
    steps = records(unbroken)
    assert [record["step"] for record in steps] == list(range(7))
    assert [("eval/heldout/greedy" in record) for record in steps] == [True, False, False, True, False, False, True]
    for record in steps[:-1]:
        phases = [v for name, v in record.items() if name.endswith("_seconds") and name != "time/step_seconds"]
        assert sum(phases) == pytest.approx(record["time/step_seconds"])
        assert record["train/skipped"] or record["policy/mismatch_max"] < 1e-4
    assert steps[0]["rollout/num_samples"] == 20
    assert "policy/grad_norm" not in steps[0]  # frozen in the first step
    assert all(record["train/skipped"] or "policy/grad_norm" in record for record in steps[1:-1])
    names = sorted(path.name for path in (unbroken / "rollouts").iterdir())
    assert names == [f"step_{step:06d}.jsonl" for step in range(6)]
    rows = [json.loads(line) for line in (unbroken / "rollouts" / names[0]).read_text().splitlines()]
    assert len(rows) == 20 and {row["policy_version"] for row in rows} == {0}
    resolved = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert resolved["algorithm"]["negative_coef"] == 0.5
    assert any((unbroken / "tensorboard").iterdir())
    assert "Held-out accuracy: heldout" in (unbroken / "report.html").read_text()
    (start,) = [json.loads(line) for line in (unbroken / "environment.jsonl").read_text().splitlines()]
    assert start["start_step"] == 0 and start["num_processes"] == 1 and start["parameters"] > 0
    assert len((unbroken / "evaluations" / "step_000000.jsonl").read_text().splitlines()) == 3


def test_the_last_and_the_best_checkpoints_are_kept(unbroken: Path) -> None:
    kept = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert kept[-2:] == ["step_000004", "step_000006"]
    assert len(kept) <= 3


def test_the_exported_policy_is_the_checkpointed_one(unbroken: Path) -> None:
    AutoTokenizer.from_pretrained(unbroken / "hf")
    exported = AutoModelForCausalLM.from_pretrained(unbroken / "hf", dtype=torch.float32).state_dict()
    folder = unbroken / "checkpoints" / "step_000006" / "policy"
    reader = TorchDistReader(folder, read_architecture(unbroken / "hf"))
    saved = {
        row.megatron: reader.shard(row, place, row.shape[0], 0, 1)
        for row, place in parameters(reader.architecture, "lm")
        if place.layer is None
    }
    norm = exported["model.norm.weight"]
    assert torch.equal(norm, saved["decoder.final_layernorm.weight"])
    assert torch.equal(exported["model.embed_tokens.weight"], saved["embedding.word_embeddings.weight"])


def test_the_same_command_again_changes_nothing(
    unbroken: Path, train_config: Metrics, command_line: Run, tmp_path: Path
) -> None:
    before = (unbroken / "metrics.jsonl").read_bytes()
    done = command_line("train", train_config | {"run_dir": str(unbroken)}, tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert without_times(unbroken) == [json.loads(line) | {} for line in strip_times(before)]


def strip_times(lines: bytes) -> list[str]:
    kept = []
    for line in lines.splitlines():
        record = {name: v for name, v in json.loads(line).items() if not name.startswith("time/")}
        kept.append(json.dumps(record))
    return kept


def test_another_configuration_is_refused(
    unbroken: Path, train_config: Metrics, command_line: Run, tmp_path: Path
) -> None:
    settings = train_config | {"run_dir": str(unbroken)}
    done = command_line("train", settings, tmp_path / "config.yaml", "rollout.temperature=0.7")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Error: run_dir:")
    assert "rollout.temperature: 1.0 -> 0.7" in done.stderr


@pytest.mark.timeout(600)
def test_killed_runs_resume_bit_for_bit(unbroken: Path, train_config: Metrics, tmp_path: Path) -> None:
    """SIGKILL at several moments, one after the other on the same run."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(train_config | {"run_dir": str(tmp_path / "run")}))
    command = [sys.executable, "-m", "megatron_oreal.cli", "train", str(config)]
    for lines_to_wait_for in (2, 4, 5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", lines_to_wait_for, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (tmp_path / "run" / "report.html").mkdir()  # A report that cannot be written costs the run one line.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    assert sum("the report was not written" in line for line in done.stderr.splitlines()) == 1
    assert without_times(tmp_path / "run") == without_times(unbroken)


def wait_for_lines(file: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if file.is_file() and len(file.read_bytes().splitlines()) >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended ({process.poll()}) or hung before record {count}")


@pytest.mark.timeout(600)
def test_two_processes_are_started_and_learn_the_same(
    unbroken: Path, train_config: Metrics, command_line: Run, tmp_path: Path
) -> None:
    """TP 2, DP 2 and CP 2 give the rollouts and losses of one process; 5 pairs do not divide by 2.

    In step 0 the reward model is zero and the policy waits; in step 1 the same policy samples, the reward model has
    learnt and the policy learns, so that every reduction over the ranks shows in a number.
    """
    alone = records(unbroken)
    assert abs(alone[1]["reward_model/loss"] - math.log(2)) > 2e-4 and alone[1]["policy/grad_norm"] > 1e-3
    assert abs(alone[1]["policy/loss"]) > 1e-5
    for name, layout in {"tensor": {"tensor": 2}, "data": {"data": 2}, "context": {"context": 2}}.items():
        settings = train_config | {"run_dir": str(tmp_path / name), "parallel": layout, "num_steps": 2}
        done = command_line("train", settings, tmp_path / f"{name}.yaml")
        assert done.returncode == 0, done.stderr
        together = records(tmp_path / name)
        for metric in ("reward/mean", "rollout/num_tokens", "train/num_tokens", "eval/heldout/greedy"):
            assert together[0][metric] == alone[0][metric], metric
        for step in range(2):
            learnt = {n: v for n, v in alone[step].items() if n.startswith(("policy/", "reward_model/", "train/"))}
            assert learnt.keys() <= together[step].keys()
            for metric, value in learnt.items():
                # The mismatch is rounding alone.
                tolerance = 1e-4 if "mismatch" in metric else 1e-6
                assert together[step][metric] == pytest.approx(value, rel=1e-4, abs=tolerance), (step, metric)
            sampled = Path("rollouts") / f"step_{step:06d}.jsonl"
            assert texts((tmp_path / name / sampled).read_text()) == texts((unbroken / sampled).read_text())


@pytest.mark.timeout(600)
def test_context_parallel_ranks_resume_bit_for_bit(train_config: Metrics, command_line: Run, tmp_path: Path) -> None:
    """Each has a part of the optimizer's state. Without its later checkpoints, a run takes the steps since again."""
    settings = train_config | {"run_dir": str(tmp_path / "run"), "parallel": {"context": 2}, "num_steps": 4}
    settings["policy"] = {"optimizer": {"lr": 0.001, "distributed": True}}
    settings["checkpoint"] = {"every": 2, "keep_last": 5}
    assert command_line("train", settings, tmp_path / "config.yaml").returncode == 0
    unbroken = without_times(tmp_path / "run")
    assert any(record.get("policy/grad_norm", 0.0) > 0 for record in unbroken[2:])
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list((checkpoints / "step_000002" / "policy").glob("__[01]_*.distcp"))) == 2  # each rank has a part
    shutil.rmtree(checkpoints / "step_000004")
    done = command_line("train", settings, tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stderr
    assert without_times(tmp_path / "run") == unbroken


def texts(lines: str) -> list[str]:
    return [json.loads(line)["response"] for line in lines.splitlines()]


@pytest.mark.timeout(600)
def test_a_killed_supervised_run_resumes_bit_for_bit(sft_config: Metrics, command_line: Run, tmp_path: Path) -> None:
    """In bfloat16, with a rate that changes at each step; killed while a checkpoint is written."""
    optimizer = {"lr": 0.01, "decay": "cosine", "warmup_steps": 1, "weight_decay": 0.1}
    settings = sft_config | {"run_dir": str(tmp_path / "unbroken"), "policy": {"optimizer": optimizer}}
    settings["model"] = sft_config["model"] | {"dtype": "bfloat16"}
    assert command_line("sft", settings, tmp_path / "a.yaml").returncode == 0
    rates = [record["policy/lr"] for record in records(tmp_path / "unbroken")[:-1]]
    assert len(set(rates)) == len(rates) == 6
    config, settings = tmp_path / "b.yaml", settings | {"run_dir": str(tmp_path / "killed")}
    config.write_text(yaml.safe_dump(settings))
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_oreal.cli", "sft", str(config)], stderr=subprocess.DEVNULL
    )
    metrics, unfinished = tmp_path / "killed" / "metrics.jsonl", tmp_path / "killed" / "checkpoints/.step_000004.tmp"
    wait_for_lines(metrics, 4, process)
    while not unfinished.exists() and len(metrics.read_bytes().splitlines()) < 6:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    done = command_line("sft", settings, config)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "unbroken")


@pytest.mark.timeout(600)
def test_prompts_and_samples_are_drawn_in_rounds(train_config: Metrics, command_line: Run, tmp_path: Path) -> None:
    """Pure rejection sampling draws again where correct samples are missing; unusable groups make room for others."""
    algorithm = {"name": "outcome", "objective": "pure_rejection_sampling", "num_correct": 2}
    settings = train_config | {"run_dir": str(tmp_path / "run"), "algorithm": algorithm, "num_steps": 2}
    settings["rollout"] = train_config["rollout"] | {"draw_rounds": 3, "prompt_rounds": 2}
    settings["alarms"] = {"mismatch": 1e-12}
    done = command_line("train", settings, tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    steps = [record for record in records(tmp_path / "run") if "policy/mismatch" in record]
    (fired,) = [event for event in read_alarms(tmp_path / "run") if event.alarm == "mismatch"]
    assert (fired.event, fired.step, fired.value) == ("fired", steps[0]["step"], steps[0]["policy/mismatch"])
    assert done.stderr.count("engine and trainer disagree by") == 1, "an alarm that lasts is told once"
    assert fired.line in (tmp_path / "run/log.txt").read_text()
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000000.jsonl").read_text().splitlines()]
    by_prompt: dict[str, list[Metrics]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    assert len(by_prompt) in (5, 10)
    for samples in by_prompt.values():
        assert len(samples) in (4, 8, 12)
        before_the_last_round = samples[:-4]
        assert sum(row["status"] == "correct" for row in before_the_last_round) < 2
        if sum(row["status"] == "correct" for row in samples) < 2:
            assert len(samples) == 12
