"""What `auto` becomes, by hand-computed memory; the other settings of speed that a CPU can check."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_oreal.config import ModelConfig, OptimizerConfig, ParallelConfig, SftConfig, TrainConfig
from megatron_oreal.engines.local.engine import rows_within
from megatron_oreal.launch import use_expandable_segments
from megatron_oreal.models import parallel
from megatron_oreal.models.build import resolved_for, transformer_config
from megatron_oreal.models.cuda_optimizer import foreach_l2_norm, foreach_scale, use_fused_adam
from megatron_oreal.models.optimizer import chosen, moment_settings
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.run.device_defaults import (
    Memory,
    estimate,
    fitting_recompute,
    parameter_count,
    with_device_defaults,
)
from megatron_oreal.weights.families import Architecture, Experts

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
QWEN_1_5B = Architecture(
    family="qwen2",
    num_layers=28,
    hidden_size=1536,
    intermediate_size=8960,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=151_936,
    max_positions=32_768,
    norm_eps=1e-6,
    rope_theta=1e6,
    qkv_bias=True,
    tied_embeddings=True,
)


def oreal_config(**model: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"run_dir": "run", "num_steps": 1, "model": {"path": "model", **model}, "data": {"prompts": "prompts.jsonl"}}
    )


def make_layout(device: torch.device, data_size: int = 1) -> ParallelLayout:
    sizes = {"tensor_size": 1, "pipeline_size": 1, "virtual_size": 1, "data_size": data_size, "world_size": data_size}
    ranks = dict.fromkeys(("rank", "tensor_rank", "pipeline_rank", "data_rank"), 0)
    groups = dict.fromkeys(("tensor_group", "pipeline_group", "data_group"))
    return ParallelLayout(**sizes, **ranks, **groups, sequence_parallel=False, device=device)  # type: ignore[arg-type]


def test_defaults_follow_the_device() -> None:
    config = ModelConfig(path=Path("model"))
    on_cuda, on_cpu = resolved_for(config, CUDA), resolved_for(config, CPU)
    assert (on_cuda.dtype, on_cuda.recompute) == ("bfloat16", "full")
    assert (on_cpu.dtype, on_cpu.recompute) == ("float32", "none")
    asked = ModelConfig(path=Path("model"), dtype="float32", recompute="none")
    assert resolved_for(asked, CUDA) == asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without CUDA")
def test_a_run_on_a_cpu_is_deterministic_and_float32() -> None:
    config = with_device_defaults(oreal_config(), QWEN_1_5B)
    assert (config.model.dtype, config.model.recompute, config.deterministic) == ("float32", "none", True)
    assert with_device_defaults(oreal_config(dtype="bfloat16"), QWEN_1_5B).model.dtype == "bfloat16"


def test_parameters_of_qwen_1_5b() -> None:
    assert parameter_count(QWEN_1_5B) == pytest.approx(1.544e9, rel=1e-3)
    assert parameter_count(dataclasses.replace(QWEN_1_5B, tied_embeddings=False)) == pytest.approx(1.777e9, rel=1e-3)


def test_a_token_is_not_multiplied_with_the_input_embedding_nor_with_idle_experts() -> None:
    untied = dataclasses.replace(QWEN_1_5B, tied_embeddings=False)
    assert parameter_count(untied, only_active=True) == parameter_count(QWEN_1_5B)
    mixture = dataclasses.replace(QWEN_1_5B, experts=Experts(8, 2, 100, True))
    idle = QWEN_1_5B.num_layers * 3 * QWEN_1_5B.hidden_size * 100 * (8 - 2)
    assert parameter_count(mixture) - parameter_count(mixture, only_active=True) == idle


def test_the_estimate_of_memory_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and reward model with 18 bytes a parameter, reference and local engine with 2 each."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    memory = estimate(oreal_config(), QWEN_1_5B)
    assert memory.states / 2**30 == pytest.approx(40 * 1.5436e9 / 2**30, rel=2e-3)
    heads = (12 + 2 * 2) * 128
    a_token = 2 * (4 * 1536 + 2 * heads + 2 * 1536 + 3 * 8960) + 2 * 2 * 4 * 1536
    assert memory.activations == 28 * 16384 * a_token
    assert memory.mlp_activations == 28 * 16384 * (2 * (2 * 1536 + 3 * 8960) + 2 * 4 * 1536)


def test_recompute_is_the_least_that_fits() -> None:
    gib = 2**30
    memory = Memory(states=50 * gib, activations=30 * gib, mlp_activations=20 * gib, one_layer=gib)
    assert fitting_recompute(memory, 83 * gib) == "none"
    assert fitting_recompute(memory, 83 * gib - 1) == "selective"
    assert fitting_recompute(memory, 64 * gib) == "selective"
    assert fitting_recompute(memory, 64 * gib - 1) == "full"


def test_1_5b_keeps_its_activations_on_141_gb_and_not_on_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    memory = estimate(oreal_config(), QWEN_1_5B)
    assert fitting_recompute(memory, int(0.85 * 139 * 2**30)) == "none"
    assert fitting_recompute(memory, int(0.85 * 79 * 2**30)) == "full"


def test_recompute_settings_reach_megatron() -> None:
    layout = make_layout(CPU)
    options = {"dtype": "float32", "recompute": "selective", "recompute_modules": ["mlp", "layernorm"]}
    megatron = transformer_config(QWEN_1_5B, ModelConfig(path=Path("m"), **options), layout, False)  # type: ignore[arg-type]
    assert (megatron.recompute_granularity, megatron.recompute_modules) == ("selective", ["mlp", "layernorm"])
    assert not megatron.bias_activation_fusion and not megatron.gradient_accumulation_fusion
    with pytest.raises(ValueError, match="recompute_modules"):
        ModelConfig(path=Path("m"), recompute_modules=["attention"])  # type: ignore[list-item]


def test_swiglu_is_fused_on_cuda_always() -> None:
    config = resolved_for(ModelConfig(path=Path("m")), CUDA)
    megatron = transformer_config(QWEN_1_5B, config, make_layout(CUDA), False)
    assert megatron.bias_activation_fusion and megatron.params_dtype is torch.bfloat16
    assert not megatron.gradient_accumulation_fusion  # Transformer Engine's


@pytest.mark.parametrize(
    ("device", "data_size", "settings", "wanted"),
    [
        (CPU, 2, {}, (False, False)),
        (CUDA, 1, {}, (False, False)),
        (CUDA, 2, {}, (True, True)),
        (CUDA, 2, {"distributed": False}, (False, True)),
        (CUDA, 2, {"overlap_grad_reduce": False}, (True, False)),
        (CPU, 1, {"distributed": True, "overlap_grad_reduce": True}, (True, True)),
    ],
)
def test_what_data_parallelism_does(
    device: torch.device, data_size: int, settings: dict[str, bool], wanted: tuple[bool, bool]
) -> None:
    layout = make_layout(device, data_size)
    config = ModelConfig(path=Path("m"), dtype="float32", recompute="none")
    megatron = transformer_config(QWEN_1_5B, config, make_layout(CPU), False)
    assert chosen(OptimizerConfig(**settings), megatron, layout) == wanted  # type: ignore[arg-type]
    megatron.num_moe_experts = 8
    if not settings:
        assert chosen(OptimizerConfig(), megatron, layout) == (wanted[0], False)


def test_bfloat16_moments_say_what_they_need() -> None:
    settings = OptimizerConfig(moments="bfloat16")
    with pytest.raises(ValueError, match=r"optimizer\.moments=bfloat16 needs optimizer\.distributed=true"):
        moment_settings(settings, is_sharded=False)
    assert moment_settings(OptimizerConfig(), is_sharded=False) == {}


def test_rows_are_bounded_by_free_memory() -> None:
    assert rows_within(1000, 10, 50, 7) == 50
    assert rows_within(1000, 10, 500, 7) == 90  # 0.9 of the memory
    with pytest.raises(ValueError, match=r"rollout\.max_new_tokens: one sequence of 7 tokens takes .*engine=sglang"):
        rows_within(10, 10, 50, 7)


def test_segments_grow_unless_the_user_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    use_expandable_segments()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # restored afterwards
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    use_expandable_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_environment_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")

    def after(tensor: int, deterministic: bool, **given: str) -> list[str | None]:
        for name in names:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        parallel.set_cuda_environment(ParallelConfig(tensor=tensor), deterministic)
        return [os.environ.get(name) for name in names]

    assert after(1, False) == [None, None, None]
    assert after(2, False) == ["1", None, None]
    assert after(1, True) == [None, ":4096:8", "0"]
    assert after(2, True, CUBLAS_WORKSPACE_CONFIG=":16:8") == ["1", ":16:8", "0"]


def test_determinism_begins_and_ends_with_the_block() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with parallel.deterministic_algorithms(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
        with parallel.deterministic_algorithms(False):
            assert not torch.are_deterministic_algorithms_enabled()
        with pytest.raises(KeyError), parallel.deterministic_algorithms(True):
            raise KeyError
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def test_fused_adam_continues_from_a_state_of_plain_adam() -> None:
    weights = [torch.nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2)]
    ours, plain = (torch.optim.AdamW([weight], lr=0.1, foreach=False) for weight in weights)
    for step in range(3):
        if step == 1:
            use_fused_adam(ours)
            assert ours.param_groups[0]["fused"] is True and ours.param_groups[0]["foreach"] is False
        for optimizer, weight in zip((ours, plain), weights, strict=True):
            weight.grad = torch.full_like(weight, step + 1.0)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])
    sgd = torch.optim.SGD([weights[0]], lr=0.1)
    use_fused_adam(sgd)
    assert not sgd.param_groups[0]["fused"]


def test_norm_and_scale_of_all_gradients_at_once() -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0], [12.0, 0.0]])]
    norm, _ = foreach_l2_norm(0, gradients[0], [gradients], False)
    assert norm.tolist() == [13.0]
    foreach_scale(0, gradients[0], [gradients, gradients], 0.5)
    assert [gradient.flatten().tolist() for gradient in gradients] == [[1.5], [0.0, 2.0, 6.0, 0.0]]
    targets = [torch.zeros(1), torch.zeros(2, 2)]
    foreach_scale(0, gradients[0], [gradients, targets], 2.0)
    assert targets[1].tolist() == [[0.0, 4.0], [12.0, 0.0]] and gradients[0].tolist() == [1.5]


def test_sft_counts_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = SftConfig.model_validate(
        {"run_dir": "run", "num_steps": 1, "model": {"path": "m"}, "data": {"examples": "e.jsonl"}}
    )
    assert estimate(config, QWEN_1_5B).states == pytest.approx(20 * parameter_count(QWEN_1_5B))
