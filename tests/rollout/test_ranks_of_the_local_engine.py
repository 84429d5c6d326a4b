"""The local engine on two ranks: all get the groups, all learn of an error, and a rank that dies is noticed."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_oreal.engines.engine import SamplingParams
from megatron_oreal.engines.local.engine import LocalEngine
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.types import Group
from tests.support.memory_engine import END, make_prompts, make_tokenizer

PARAMS = SamplingParams(max_new_tokens=12, stop_token_ids=(END,))
PROMPTS = make_prompts(5)
VOCAB_SIZE = 17  # of the tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    make_tokenizer(path)
    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
    )
    Qwen2ForCausalLM(settings).save_pretrained(path / "model")
    return path


def open_sampler(folder: Path, rank: int, name: str, num_ranks: int = 2) -> Sampler:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=num_ranks)
    engine = LocalEngine(folder / "model", torch.device("cpu"), torch.float32, 4, dist.group.WORLD)
    return Sampler(engine, make_tokenizer(folder), MathVerifier(), is_main=rank == 0, require_stop=True)


def tokens_of(groups: list[Group]) -> list[list[int]]:
    return [sample.response_ids.tolist() for group in groups for sample in group.samples]


def sample_on_rank(rank: int, folder: str) -> None:
    """Waves of four requests a rank; then one rank fails, and after that the other one."""
    sampler = open_sampler(Path(folder), rank, "sampling")
    assert isinstance(sampler.engine, LocalEngine)
    groups = sampler.sample(PROMPTS, 3, PARAMS, "seed")
    assert all(bool(sample.response_text) <= (rank == 0) for group in groups for sample in group.samples)
    assert all(sample.is_judged for group in groups for sample in group.samples)
    torch.save((tokens_of(groups), [group.pass_rate for group in groups]), f"{folder}/rank{rank}.pt")
    for failing in (1, 0):
        sampler.engine.has_whole_weights = rank != failing
        where = "rank 1 could not generate: RuntimeError: " if failing == 1 else ""
        with pytest.raises((RuntimeError, OSError), match=f"^{where}the local engine is half updated"):
            sampler.sample(PROMPTS, 3, PARAMS, "seed")
        sampler.engine.has_whole_weights = True
    assert tokens_of(sampler.sample(PROMPTS, 3, PARAMS, "seed")) == tokens_of(groups)  # it goes on
    dist.destroy_process_group()


def test_all_ranks_get_the_groups_and_learn_of_errors(folder: Path) -> None:
    mp.spawn(sample_on_rank, args=(str(folder),), nprocs=2)
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
    assert first == second
    engine = LocalEngine(folder / "model", torch.device("cpu"), torch.float32, 64)
    sampler = Sampler(engine, make_tokenizer(folder), MathVerifier(), is_main=True, require_stop=True)
    assert tokens_of(sampler.sample(PROMPTS, 3, PARAMS, "seed")) == first[0]


def die_on_rank(rank: int, folder: str, dying: int) -> None:
    sampler = open_sampler(Path(folder), rank, f"dying{dying}")
    if rank == dying:
        sampler.engine.take_part = lambda: os._exit(0)  # type: ignore[method-assign]  # the moment of its death
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        sampler.sample(PROMPTS, 3, PARAMS, "seed")
    Path(f"{folder}/survivor{rank}").write_text(str(time.monotonic() - begin))
    os._exit(0)  # the group is broken: destroying it would wait


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_dies_does_not_hang_the_others(folder: Path, dying: int) -> None:
    mp.spawn(die_on_rank, args=(str(folder), dying), nprocs=2)
    assert float((folder / f"survivor{1 - dying}").read_text()) < 60
