"""The local engine ends responses at stop strings as cutting them afterwards does, and within all limits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_oreal.engines.engine import GenerationRequest, SamplingParams
from megatron_oreal.engines.local import waves
from megatron_oreal.engines.local.engine import LocalEngine
from megatron_oreal.engines.stop_strings import tail_length, tokens_to_stop_string
from megatron_oreal.types import Int32Array

LETTERS = "abcdefghijklmnopqrstuvwxyz"
REQUESTS = [GenerationRequest(prompt, seed) for prompt in ([3, 1, 4], [5], [8, 9, 7, 9, 3]) for seed in range(12)]
LONG = SamplingParams(max_new_tokens=40, stop_token_ids=(2,))


def decode(ids: Int32Array) -> str:
    """Every fifth token has no text."""
    return "".join(LETTERS[number % 26] for number in np.asarray(ids).tolist() if number % 5)


def make_engine(path: Path, with_decode: bool = True) -> LocalEngine:
    return LocalEngine(path, torch.device("cpu"), torch.float32, 8, decode=decode if with_decode else None)


@pytest.mark.parametrize("tokens_between_looks", [1, 8])  # as on a CPU, as on a GPU
@pytest.mark.parametrize("stop_strings", [("b",), ("gc", "xy", "d"), ("zzzzzz",)])
def test_responses_end_where_they_were_cut_before(
    tied_path: Path, monkeypatch: pytest.MonkeyPatch, tokens_between_looks: int, stop_strings: tuple[str, ...]
) -> None:
    monkeypatch.setitem(waves.TOKENS_BETWEEN_LOOKS, "cpu", tokens_between_looks)
    params = replace(LONG, stop_strings=stop_strings)
    whole = make_engine(tied_path, with_decode=False).generate(REQUESTS, params)
    num_cut = 0
    for uncut, response in zip(whole, make_engine(tied_path).generate(REQUESTS, params), strict=True):
        length = tokens_to_stop_string(uncut.response_ids, stop_strings, decode)
        got = tokens_to_stop_string(response.response_ids, stop_strings, decode)
        assert response.response_ids[:got].tolist() == uncut.response_ids[:length].tolist()
        assert np.allclose(response.model_logprobs[:got], uncut.model_logprobs[:length], atol=1e-5)
        if length is not None and uncut.response_ids[-1] != 2:
            assert len(response.response_ids) == length and response.finish_reason == "stop"
            num_cut += length < len(uncut.response_ids)
    assert num_cut > 3 or stop_strings == ("zzzzzz",)


def test_without_stop_strings_nothing_changes(tied_path: Path) -> None:
    for one, other in zip(
        make_engine(tied_path).generate(REQUESTS, LONG),
        make_engine(tied_path, with_decode=False).generate(REQUESTS, LONG),
        strict=True,
    ):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.model_logprobs.tolist() == other.model_logprobs.tolist()


@pytest.mark.parametrize("stop_token_ids", [(), (2,)])
def test_prompt_and_response_have_a_common_limit(tied_path: Path, stop_token_ids: tuple[int, ...]) -> None:
    params = replace(LONG, stop_token_ids=stop_token_ids, max_new_tokens=10, max_total_tokens=12)
    free = make_engine(tied_path).generate(REQUESTS, replace(params, max_total_tokens=None))
    for request, response, longer in zip(
        REQUESTS, make_engine(tied_path).generate(REQUESTS, params), free, strict=True
    ):
        limit = min(10, 12 - len(request.prompt_ids))
        assert response.response_ids.tolist() == longer.response_ids[:limit].tolist()
        assert np.allclose(response.model_logprobs, longer.model_logprobs[:limit], atol=1e-5)
        assert response.finish_reason == ("stop" if response.response_ids[-1] in stop_token_ids else "length")
    with pytest.raises(ValueError, match=r"^rollout\.max_total_tokens=5: the prompt of request 24 has 5 tokens"):
        make_engine(tied_path).generate(REQUESTS, replace(params, max_total_tokens=5))


def test_the_tail_spans_the_longest_stop_string() -> None:
    assert tail_length(["ab", "日本"], num_new=8) == 6 + 8 + 8
    assert tokens_to_stop_string(np.array([1, 5, 2, 3, 2, 3], np.int32), ["cd"], decode) == 4
    assert tokens_to_stop_string(np.array([1, 2], np.int32), ["cd"], decode) is None
