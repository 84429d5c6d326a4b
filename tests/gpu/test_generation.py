"""Generation on CUDA: the sampler against the sort, and the local engine's decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_oreal.engines.engine import GenerationRequest, SamplingParams
from megatron_oreal.engines.local import token_sampling
from megatron_oreal.engines.local.engine import LocalEngine
from megatron_oreal.engines.local.token_sampling import draw_with, truncate, uniforms
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.gpu


def test_the_sampler_agrees_with_the_sort() -> None:
    pytest.importorskip("triton")
    from tests.support.workers import triton_sampling_worker

    triton_sampling_worker.main()


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.8, 0.9), SamplingParams(1.2, 0.95, 50)])
def test_frequencies_follow_the_truncated_distribution(params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, generator=generator).cuda()
    num_draws = 50_000
    uniform = uniforms(torch.arange(num_draws, device="cuda"), 3)
    draws = draw_with(logits.expand(num_draws, -1), uniform, params)
    wanted = truncate(logits[None] / params.temperature, params.top_k, params.top_p)[0].double().softmax(0)
    counts = draws.token_ids.bincount(minlength=500)
    assert int(counts[wanted == 0].sum()) == 0
    deviation = (counts / num_draws - wanted).abs() / (wanted / num_draws).sqrt().clamp_min(1e-9)
    assert float(deviation[wanted > 1e-3].max()) < 5  # standard errors
    torch.testing.assert_close(draws.rollout_logprobs.double(), wanted[draws.token_ids].log(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling_does_not_wait_for_the_gpu(top_p: float) -> None:
    assert token_sampling.gpu_sampler() is not None
    logits = torch.randn(64, 151_936, device="cuda")
    uniform = uniforms(torch.arange(64, device="cuda"), 0)
    draw_with(logits, uniform, SamplingParams(top_p=top_p))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw_with(logits, uniform, SamplingParams(top_p=top_p))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_local_engine_gives_on_cuda_what_it_gives_on_a_cpu(tmp_path: Path) -> None:
    """Float32, prompts of several lengths, rows that end at different times: the same tokens."""
    path = write_tiny_model(tmp_path, tied=True)
    requests = [GenerationRequest([3 + number % 4] * (2 + number % 4), seed=number) for number in range(40)]
    for params in (
        SamplingParams(0, 1.0, 0, 30, stop_token_ids=(1, 2, 3)),
        SamplingParams(1.0, 1.0, 0, 100, stop_token_ids=(1, 2)),
        SamplingParams(0.9, 0.8, 20, 30, stop_token_ids=(1,)),
    ):
        found, wanted = (
            LocalEngine(path, torch.device(device), torch.float32, 16).generate(requests, params)
            for device in ("cuda", "cpu")
        )
        same = [np.array_equal(a.response_ids, b.response_ids) for a, b in zip(found, wanted, strict=True)]
        assert sum(same) >= len(same) - 1, same  # one may differ by rounding
        for a, b, equal in zip(found, wanted, same, strict=True):
            if equal:
                assert a.finish_reason == b.finish_reason
                assert a.model_logprobs == pytest.approx(b.model_logprobs, abs=1e-3)
                assert a.rollout_logprobs == pytest.approx(b.rollout_logprobs, abs=1e-3)


def test_bfloat16_logits_are_float32(tmp_path: Path) -> None:
    engine = LocalEngine(write_tiny_model(tmp_path, tied=True), torch.device("cuda"), torch.bfloat16, 8)
    prompt = torch.tensor([[5, 6, 7]], device="cuda")
    none, first = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
    logits, decoding = engine._open_decoder().start(prompt, none, first, 40)
    assert logits.dtype is torch.float32
    assert decoding.advance(torch.tensor([1, 2, 3], device="cuda")).dtype is torch.float32
