"""Checkpoints of a real model: what comes back, which are kept, what a kill or a power cut leaves, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import save_file

from megatron_oreal.algorithms.losses import cross_entropy
from megatron_oreal.checkpoint.pieces import pieces_of
from megatron_oreal.checkpoint.rank_files import random_state, restore_random_state
from megatron_oreal.checkpoint.torch_dist_state import read_metadata
from megatron_oreal.checkpoint.train_state import (
    CheckpointError,
    Progress,
    TrainState,
    saved_steps,
)
from megatron_oreal.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainableConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.observability import files
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import LossOutput, Microbatch, TokenOutputs
from megatron_oreal.weights.families import read_architecture
from tests.support.disk import recorded_disk
from tests.support.tiny_models import random_sequences, write_tiny_model

CURSOR: Any = {"position": 3}
METRIC = "eval/heldout/greedy"


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0, deterministic=True)
    parallel.finalize()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("train_state"), tied=True, num_layers=1)


def build(path: Path, layout: ParallelLayout, distributed: bool = False, dtype: Any = "bfloat16") -> TrainableModel:
    """In bfloat16, with a learning rate that changes at every step."""
    architecture = read_architecture(path)
    optimizer = OptimizerConfig(lr=3e-4, decay="cosine", warmup_steps=2, distributed=distributed)
    head = LogprobHead(layout, architecture.vocab_size)
    config = ModelConfig(path=path, dtype=dtype)
    model = TrainableModel("policy", architecture, head, config, layout, TrainableConfig(optimizer=optimizer), 8)
    model.load_weights(path)
    return model


def state_of(model: TrainableModel, layout: ParallelLayout, folder: Path, **settings: Any) -> TrainState:
    return TrainState(folder, {"policy": model}, layout, CheckpointConfig(**settings))


def train(model: TrainableModel) -> dict[str, float]:
    """One step on a batch that is drawn at random, with a loss that random numbers weigh."""
    sequences = random_sequences(3, seed=random.randrange(1000))
    batch = pack(sequences, PackingPlan(data_rank=0, data_size=1, microbatch_tokens=64))

    def loss(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
        mean = cross_entropy(outputs, microbatch, batch)
        return LossOutput(mean.loss * (0.5 + torch.rand(())), mean.metrics)

    return model.train_step(batch, loss)


def test_a_resumed_run_is_the_unbroken_one(path: Path, layout: ParallelLayout, tmp_path: Path) -> None:
    """Masters, moments, schedule and every random state: any that is not restored changes the next numbers."""
    random.seed(5)
    torch.manual_seed(6)
    get_cuda_rng_tracker().reset()
    get_cuda_rng_tracker().add("model-parallel-rng", 7)
    model = build(path, layout)
    for _ in range(3):
        train(model)
    torch.randn(1)  # leaves half of a pair to the next call
    random.gauss(0, 1)
    progress = Progress(3, CURSOR, 1, {METRIC: 0.5})
    assert state_of(model, layout, tmp_path).save(progress) == tmp_path / "step_000003"

    def go_on(model: TrainableModel) -> list[Any]:
        drawn = [random.gauss(0, 1), float(torch.randn(())), get_cuda_rng_tracker().get_states()["model-parallel-rng"]]
        return [train(model), train(model), *drawn, [p.detach().clone() for _, p in model.parameters()]]

    expected = go_on(model)
    random.seed(8)
    torch.manual_seed(9)
    get_cuda_rng_tracker().reset()
    get_cuda_rng_tracker().add("model-parallel-rng", 10)
    resumed = build(path, layout)
    assert state_of(resumed, layout, tmp_path).load_latest() == progress
    found = go_on(resumed)
    assert found[:4] == expected[:4]
    assert torch.equal(found[4], expected[4])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[5], expected[5], strict=True))
    assert found[0]["policy/lr"] != found[1]["policy/lr"]


def test_the_best_checkpoint_is_kept_wherever_it_is(path: Path, layout: ParallelLayout, tmp_path: Path) -> None:
    scores = {1: 0.2, 2: 0.7, 3: None, 4: 0.7, 5: 0.1, 6: 0.3}
    model = build(path, layout)
    kept = []
    state = state_of(model, layout, tmp_path, keep_last=1, keep_best=1, best_metric=METRIC)
    for step, score in scores.items():
        state.save(Progress(step, CURSOR, evaluation={} if score is None else {METRIC: score, "eval/other": -score}))
        kept.append(saved_steps(tmp_path))
    assert kept == [[1], [2], [2, 3], [2, 4], [2, 5], [2, 6]]  # the first of two equals
    two = state_of(model, layout, tmp_path / "two", keep_last=2, keep_best=2, best_metric=METRIC)
    for step, score in scores.items():
        two.save(Progress(step, CURSOR, evaluation={} if score is None else {METRIC: score}))
    assert saved_steps(tmp_path / "two") == [2, 4, 5, 6]
    without = state_of(model, layout, tmp_path / "last", keep_last=2)
    for step in (1, 2, 10):
        without.save(Progress(step, CURSOR, evaluation={METRIC: 1 / step}))
    assert saved_steps(tmp_path / "last") == [2, 10]
    assert [entry.name for entry in tmp_path.glob(".*")] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
def test_a_checkpoint_is_on_disk_before_it_takes_its_name(
    path: Path, layout: ParallelLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(path, layout)
    state = state_of(model, layout, tmp_path, keep_last=1)
    state.save(Progress(1, CURSOR))
    with recorded_disk(monkeypatch) as disk:
        state.save(Progress(2, CURSOR))
    assert disk.synced[-1][0] == tmp_path.name  # after the rename
    assert {"step_000001", "step_000002"} <= disk.names[tmp_path]  # the old one goes only then
    final, temporary = tmp_path / "step_000002", tmp_path / ".step_000002.tmp"
    for file in final.rglob("*"):
        written = temporary / file.relative_to(final)
        if file.name == ".metadata":  # torch writes it beside and renames it
            written = written.with_name(".metadata.tmp")
        if file.is_file():
            assert disk.contents[written] == file.read_bytes(), file
        else:
            assert disk.names[written] == {entry.name for entry in file.iterdir()}, file
    assert disk.names[temporary] == {"policy", "random_t00_p00.pt", "run.json"}
    assert {".metadata", "__0_0.distcp", "common.pt"} <= disk.names[temporary / "policy"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_inside_a_checkpoint(
    path: Path, layout: ParallelLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends after each of the writes leaves the checkpoint before, or the whole new one."""
    model = build(path, layout)
    state = state_of(model, layout, tmp_path, keep_last=1)
    state.save(Progress(1, CURSOR))
    wanted = {name: parameter.detach().clone() for name, parameter in model.parameters()}
    train(model)
    found = []
    for number in range(20):
        pid = os.fork()
        if pid == 0:
            left = iter(range(number))
            write_through = os.fsync

            def fsync(descriptor: int, left: Iterator[int] = left, sync: Callable[[int], None] = write_through) -> None:
                if next(left, None) is None:
                    os._exit(9)
                sync(descriptor)

            monkeypatch.setattr(os, "fsync", fsync)
            state.save(Progress(2, CURSOR))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        restored = build(path, layout)
        progress = state_of(restored, layout, tmp_path, keep_last=1).load_latest()
        assert progress is not None and not list(tmp_path.glob(".*"))
        found.append(progress.step)
        if status == 0:
            break
        if progress.step == 1:
            assert all(torch.equal(parameter, wanted[name]) for name, parameter in restored.parameters())
    assert found[0] == 1 and found[-1] == 2 and found == sorted(found) and found.count(1) >= 8


def test_training_goes_on_while_a_checkpoint_is_written(path: Path, layout: ParallelLayout, tmp_path: Path) -> None:
    """The checkpoint holds the state of its step. Until it is complete the one before counts."""
    model = build(path, layout)
    state = state_of(model, layout, tmp_path)
    assert state.poll() is None and state.complete() is None
    state.save(Progress(1, CURSOR))
    train(model)
    wanted = {name: parameter.detach().clone() for name, parameter in model.parameters()}
    state.begin(Progress(2, CURSOR))
    train(model)
    assert saved_steps(tmp_path) == [1]
    while (saved := state.poll()) is None:
        time.sleep(0.01)
    assert saved.path == tmp_path / "step_000002" and saved.seconds > 0
    written = saved.path / "policy" / "__0_0.distcp"
    assert 0 < saved.num_bytes <= written.stat().st_size
    restored = build(path, layout)
    assert state_of(restored, layout, tmp_path).load_latest() == Progress(2, CURSOR)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in restored.parameters())


def test_a_save_that_is_under_way_when_a_process_dies_is_removed(
    path: Path, layout: ParallelLayout, tmp_path: Path
) -> None:
    """All files of a rank are written, and nothing has been renamed."""
    model = build(path, layout)
    state = state_of(model, layout, tmp_path)
    state.save(Progress(1, CURSOR))
    state.begin(Progress(2, CURSOR))
    assert state.pending is not None
    state.pending.written.result()
    assert (tmp_path / ".step_000002.tmp" / "policy" / "__0_0.distcp").is_file()
    assert state_of(build(path, layout), layout, tmp_path).load_latest() == Progress(1, CURSOR)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000001"]


def write_rank_files(state: TrainState, progress: Progress) -> None:
    """Writes a checkpoint of the format before torch_dist, for one rank."""
    folder = state.folder / f"step_{progress.step:06d}"
    (folder / "policy").mkdir(parents=True)
    model: Any = state.models["policy"]
    parameters = {name: parameter.detach().clone() for name, parameter in model.parameters()}
    save_file(parameters, folder / "policy" / "parameters_t00_p00.safetensors")
    torch.save(model.training_state(), folder / "policy" / "optimizer_t00_p00_d000.pt")
    torch.save(random_state(), folder / "random_t00_p00.pt")
    layout = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 0}
    (folder / "run.json").write_text(json.dumps({"layout": layout, "progress": asdict(progress)}))


def test_the_format_before_is_resumed_by_the_same_layout(path: Path, layout: ParallelLayout, tmp_path: Path) -> None:
    model = build(path, layout)
    train(model)
    write_rank_files(state_of(model, layout, tmp_path), Progress(2, CURSOR))
    expected = train(model)
    resumed = build(path, layout)
    assert state_of(resumed, layout, tmp_path).load_latest() == Progress(2, CURSOR)
    assert train(resumed) == expected
    for other in ({"tensor_size": 2}, {"pipeline_size": 2}, {"virtual_size": 2}):
        with pytest.raises(ValueError, match=r"^parallel: .*step_000002 was written with .*'tensor': 1.*this run has"):
            state_of(resumed, replace(layout, **other), tmp_path).load_latest()
    assert state_of(resumed, replace(layout, data_size=3), tmp_path).load_latest() == Progress(2, CURSOR)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 2}, r"model.path: .* has the shape \(1, .*this run's model has \(2, "),
        ({"intermediate_size": 112}, r"model.path: .*linear_fc1.weight .* has the shape "),
        ({"dtype": "float32"}, r"model.dtype: .* is torch.bfloat16, this run needs torch.float32"),
        ({"name": "critic"}, r"run_dir: .*step_000002 holds the models policy, this run trains critic"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(
    path: Path, layout: ParallelLayout, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    state_of(build(path, layout), layout, tmp_path).save(Progress(2, CURSOR))
    name, dtype = settings.pop("name", "policy"), settings.pop("dtype", "bfloat16")
    other = path if not settings else write_tiny_model(tmp_path / "other", **{"tied": True, "num_layers": 1} | settings)
    state = TrainState(tmp_path, {name: build(other, layout, dtype=dtype)}, layout, CheckpointConfig())
    with pytest.raises(ValueError, match=f"^{message}") as error:
        state.load_latest()
    assert "\n" not in str(error.value)


def test_a_write_that_fails_leaves_the_checkpoints_before(
    path: Path, layout: ParallelLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(build(path, layout), layout, tmp_path)
    state.save(Progress(1, CURSOR))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(
            CheckpointError, match=r"step_000002 could not be written: the disk is full; .* goes on after step 1"
        ):
            state.save(Progress(2, CURSOR))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000001"]
    (tmp_path / "step_000002").write_text("a file of somebody")
    with pytest.raises(CheckpointError, match="step_000002 could not be put in its place"):
        state.save(Progress(2, CURSOR))


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def replace_metadata_by_code(folder: Path) -> None:
    (folder / "policy" / ".metadata").write_bytes(pickle.dumps(Code(folder.parent / "made by code")))


def replace_random_by_pickle(folder: Path) -> None:
    (folder / "random_t00_p00.pt").write_bytes(pickle.dumps(Code(folder.parent / "made by code")))


def drop_a_chunk(folder: Path) -> None:
    metadata = read_metadata(folder / "policy")
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear()
    (folder / "policy" / ".metadata").write_bytes(pickle.dumps(metadata))


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "code in the metadata": replace_metadata_by_code,
    "code as random states": replace_random_by_pickle,
    "no such chunk": drop_a_chunk,
    "half of run.json": cut("run.json"),
    "half of the metadata": cut("policy/.metadata"),
    "half of the tensors": cut("policy/__0_0.distcp"),
    "no random states": lambda folder: (folder / "random_t00_p00.pt").unlink(),
    "another record": lambda folder: (folder / "run.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    path: Path, layout: ParallelLayout, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    state = state_of(build(path, layout), layout, tmp_path)
    state.save(Progress(7, CURSOR))
    damage(tmp_path / "step_000007")
    with pytest.raises(ValueError, match=r"^run_dir: checkpoint .*step_000007 is damaged .*remove it to start again$"):
        state.load_latest()
    assert not (tmp_path / "made by code").exists()
    state.save(Progress(6, CURSOR))
    with pytest.raises(ValueError, match=r"step_000007 is damaged .*remove it to resume from .*step_000006$"):
        state.load_latest()


def test_a_step_is_saved_again(path: Path, layout: ParallelLayout, tmp_path: Path) -> None:
    """Over what is there, and over what a killed process has left half written; folders are made as needed."""
    folder = tmp_path / "run" / "checkpoints"
    model = build(path, layout)
    state = state_of(model, layout, folder)
    for number, step in enumerate((5, 5)):
        (folder / f".step_{step:06d}.tmp" / "policy").mkdir(parents=True) if number else None
        (folder / f".step_{step:06d}.tmp" / "policy" / "left").write_text("") if number else None
        state.save(Progress(step, CURSOR, num_skipped_steps=number))
        assert state.load_latest() == Progress(step, CURSOR, number)
    assert [entry.name for entry in folder.iterdir()] == ["step_000005"]
    assert {file.name for file in (folder / "step_000005" / "policy").iterdir()} == {
        ".metadata", "__0_0.distcp", "__extra_0.distcp", "common.pt", "metadata.json",
    }  # fmt: skip
    record = json.loads((folder / "step_000005" / "run.json").read_text())
    assert record["progress"] == {"step": 5, "cursor": CURSOR, "num_skipped_steps": 1, "evaluation": {}}
    assert Progress(1, CURSOR).num_skipped_steps == 0


def test_another_layout_keeps_its_own_tensor_parallel_random_states(
    path: Path, layout: ParallelLayout, tmp_path: Path
) -> None:
    """The others are those of the first rank. What differs in Megatron's tracker belongs to a rank of one layout."""
    state = state_of(build(path, layout), layout, tmp_path)
    get_cuda_rng_tracker().reset()
    get_cuda_rng_tracker().add("model-parallel-rng", 7)
    random.seed(5)
    torch.manual_seed(6)
    state.save(Progress(2, CURSOR))
    record = json.loads((tmp_path / "step_000002" / "run.json").read_text())
    assert record["layout"] == {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 1}
    assert record["models"] == {"policy": {"num_updates": 0, "num_adam_steps": 0}}
    expected = random.random(), float(torch.rand(()))
    (tmp_path / "step_000002" / "run.json").write_text(
        json.dumps(record | {"layout": record["layout"] | {"pipeline": 2}})
    )
    get_cuda_rng_tracker().reset()
    get_cuda_rng_tracker().add("model-parallel-rng", 8)
    mine = get_cuda_rng_tracker().get_states()["model-parallel-rng"].clone()
    assert state.load_latest() == Progress(2, CURSOR)
    assert (random.random(), float(torch.rand(()))) == expected
    assert torch.equal(get_cuda_rng_tracker().get_states()["model-parallel-rng"], mine)


def test_replicas_share_the_work(path: Path, layout: ParallelLayout) -> None:
    """Each tensor of a model is written by one of them; with a sharded optimizer, each writes its own part."""
    model = build(path, layout)
    train(model)
    written = [
        {piece.key + str(piece.offsets) for piece in pieces_of(model, replica) if piece.is_written_here}
        for replica in (replace(layout, data_rank=rank, data_size=3) for rank in range(3))
    ]
    everything = {piece.key + str(piece.offsets) for piece in pieces_of(model, layout)}
    assert all(written) and set.union(*written) == everything and sum(map(len, written)) == len(everything)


def test_leftovers_go_and_what_is_not_ours_stays(path: Path, layout: ParallelLayout, tmp_path: Path) -> None:
    state = state_of(build(path, layout), layout, tmp_path)
    assert state.load_latest() is None
    for name in (".step_000003.tmp", ".step_000002.old.tmp", ".step_3.tmp", "step_000001.bak", "notes"):
        (tmp_path / name).mkdir()
    assert state.load_latest() is None
    assert {entry.name for entry in tmp_path.iterdir()} == {".step_3.tmp", "step_000001.bak", "notes"}


def test_the_random_state_of_a_gpu_is_saved_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[torch.Tensor] = []
    state = torch.arange(16, dtype=torch.uint8)
    assert "cuda" not in random_state() or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    saved = random_state()
    assert saved["cuda"] is state
    restore_random_state(saved)
    assert len(restored) == 1 and restored[0] is state
