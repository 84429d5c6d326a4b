"""What is asked of a server, and where a response ends: nothing here needs one."""

import numpy as np

from megatron_oreal.engines.engine import GenerationRequest, SamplingParams
from megatron_oreal.engines.sglang.generate_api import Chunk, PartialResponse
from megatron_oreal.types import Int32Array

REQUEST = GenerationRequest([1, 2], 0)


def decode(ids: Int32Array) -> str:
    return "".join("abcdefgh"[number] for number in np.asarray(ids).tolist())


def test_every_end_token_ends_a_response_at_the_first_request() -> None:
    response = PartialResponse.of(REQUEST, SamplingParams(max_new_tokens=8192, stop_token_ids=(2, 7)))
    response.add(Chunk([3, 7], [-0.1, -0.1], [0, 0], "stop"))
    assert response.num_missing == 0 and response.generation().finish_reason == "stop"


def test_an_end_token_that_only_the_server_knows_ends_a_response_too() -> None:
    response = PartialResponse.of(REQUEST, SamplingParams(max_new_tokens=8192, stop_token_ids=(2,)))
    response.add(Chunk([3, 7], [-0.1, -0.1], [0, 0], "stop"))
    assert response.num_missing == 0 and response.generation().finish_reason == "stop"
    params = SamplingParams(max_new_tokens=8192, stop_token_ids=(2,), stop_strings=("gg",))
    response = PartialResponse.of(REQUEST, params, decode)
    response.add(Chunk([3, 7], [-0.1, -0.1], [0, 0], "stop", matched_token=True))
    assert response.num_missing == 0 and response.generation().finish_reason == "stop"


def test_stop_strings_are_sent_and_end_a_response() -> None:
    params = SamplingParams(max_new_tokens=9, stop_token_ids=(7,), stop_strings=("cd", "gg"))
    response = PartialResponse.of(REQUEST, params, decode)
    sampling = response.body("r")["sampling_params"]
    assert sampling["stop"] == ["cd", "gg"] and sampling["no_stop_trim"] and not sampling["ignore_eos"]
    response.add(Chunk([1, 2], [-0.1, -0.1], [0, 0], "stop"))  # the server has seen what the text leaves out
    assert response.num_missing == 7 and response.generation().finish_reason == "abort"
    response.add(Chunk([3], [-0.1], [0], "stop"))
    assert response.num_missing == 0 and response.generation().finish_reason == "stop"
    assert response.token_ids.tolist() == [1, 2, 3]


def test_without_a_decoder_stop_strings_are_left_to_the_sampler() -> None:
    params = SamplingParams(max_new_tokens=9, stop_strings=("cd",))
    assert "stop" not in PartialResponse.of(REQUEST, params).body("r")["sampling_params"]


def test_prompt_and_response_have_a_common_limit() -> None:
    response = PartialResponse.of(REQUEST, SamplingParams(max_new_tokens=9, max_total_tokens=6))
    assert response.body("r")["sampling_params"]["max_new_tokens"] == 4
    response.add(Chunk([3, 3, 3, 3], [-0.1] * 4, [0] * 4, "length"))
    assert response.num_missing == 0 and response.generation().finish_reason == "length"
