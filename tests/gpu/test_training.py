"""An update on CUDA: attention over packed tokens, no waiting inside micro-batches, the optimizer, memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_oreal.config import ModelConfig, ParallelConfig
from megatron_oreal.models import parallel
from megatron_oreal.models.attention import causal_batch, padded_batches, variable_length_attention
from megatron_oreal.models.cuda_optimizer import foreach_l2_norm, foreach_scale, use_fused_adam
from megatron_oreal.parallel.layout import ParallelLayout
from tests.support.tiny_models import write_tiny_model
from tests.support.updates import passes_over_microbatches

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0)
    parallel.finalize()


@pytest.mark.parametrize("heads", [(12, 2), (4, 4), (14, 2)])
def test_packed_attention_agrees_with_float32(heads: tuple[int, int]) -> None:
    """Values and gradients of bfloat16 with grouped heads, beside the same numbers in float32, segment by segment."""
    attend = variable_length_attention()
    assert attend is not None, "torch's variable-length attention is not used on CUDA"
    lengths, head_dim, scale = [300, 1, 17, 128, 578], 128, 128**-0.5
    generator = torch.Generator().manual_seed(0)
    query, key, value, weights = (
        torch.randn(sum(lengths), count, head_dim, generator=generator).cuda().bfloat16()
        for count in (heads[0], heads[1], heads[1], heads[0])
    )
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device="cuda")

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, cu_seqlens, max(lengths), scale)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat(
            [causal_batch(q[a:b][None], k[a:b][None], v[a:b][None], scale)[0] for a, b in pairwise(starts)]
        )

    results = []
    for function, dtype in ((packed, torch.bfloat16), (exact, torch.float32)):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, key, value)]
        out = function(*leaves)
        (out.float() * weights.float()).sum().backward()
        results.append([out.float(), *(leaf.grad.float() for leaf in leaves)])
    for ours, wanted in zip(*results, strict=True):
        error = float((ours - wanted).norm() / wanted.norm())
        assert error < 1e-2, error


def test_padded_batches_agree_with_packed_tokens() -> None:
    """Float32, which variable-length attention does not take."""
    lengths, scale = [5, 3, 20, 4], 0.25
    query, key, value = (torch.randn(32, count, 16, device="cuda") for count in (4, 2, 2))
    indices, restore = padded_batches(lengths)
    padded = [causal_batch(query[i.cuda()], key[i.cuda()], value[i.cuda()], scale).flatten(0, 1) for i in indices]
    found = torch.cat(padded).index_select(0, restore.cuda())
    wanted = [
        causal_batch(q[None], k[None], v[None], scale)[0]
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_no_microbatch_waits_for_the_gpu(layout: ParallelLayout, tmp_path: Path, recompute: str) -> None:
    path = write_tiny_model(tmp_path, tied=False, num_layers=2)
    passes = passes_over_microbatches(path, layout, ModelConfig(path=path, recompute=recompute))
    for run in passes.values():  # compiles, and checks attention once
        run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run in passes.values():
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fused_adam_takes_the_same_steps() -> None:
    weights = [torch.randn(300, 7, device="cuda") for _ in range(3)]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in weights] for _ in range(2))
    fused = torch.optim.AdamW([{"params": ours}], lr=1e-2, weight_decay=0.1)
    plain = torch.optim.AdamW([{"params": theirs}], lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(4):
        if step != 1:  # also in the middle, as after a checkpoint that was written elsewhere
            use_fused_adam(fused)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        fused.step()
        plain.step()
    assert fused.param_groups[0]["fused"] and not fused.param_groups[0]["foreach"]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_gradient_norm_and_clipping_do_not_wait() -> None:
    gradients = [torch.full((3, count), 2.0, device="cuda") for count in (1, 5, 6)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm, _ = foreach_l2_norm(0, gradients[0], [gradients], False)
        foreach_scale(0, gradients[0], [gradients, gradients], 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.tolist() == pytest.approx([(36 * 4) ** 0.5])
    assert all(bool((gradient == 1.0).all()) for gradient in gradients)


def test_memory_of_an_offloaded_model_goes_back_to_the_driver() -> None:
    from megatron_oreal.models.offload import DeviceMemory

    tensor, memory = torch.ones(2**28, device="cuda"), DeviceMemory()
    before = torch.cuda.mem_get_info()[0]
    memory.offload([tensor], [])
    assert torch.cuda.mem_get_info()[0] - before >= 0.9 * 2**30
    memory.restore()
    assert float(tensor.sum(dtype=torch.float64)) == 2.0**28


def test_deterministic_updates_have_an_algorithm_for_everything(layout: ParallelLayout, tmp_path: Path) -> None:
    """Without warn_only; and the mode ends with the update, so that generation is not slowed down."""
    path = write_tiny_model(tmp_path, tied=True, num_layers=2)
    for dtype in ("bfloat16", "float32"):
        for name, run in passes_over_microbatches(path, layout, ModelConfig(path=path, dtype=dtype)).items():
            with parallel.deterministic_algorithms(name != "coefficients"):
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
                run()
            assert not torch.are_deterministic_algorithms_enabled()
