"""A response depends on its own seed, not on what else its server decodes at the same time. Against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from megatron_oreal.engines.sglang.client import EventLoopThread, SglangClient
from megatron_oreal.engines.sglang.servers.fleet import ServerFleet
from megatron_oreal.engines.sglang.servers.seeds import draw_in_order_of_ids

NUM_REQUESTS = 32
OTHERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.5},
]


def body(seed: int, **sampling: Any) -> dict[str, Any]:
    plain = {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True, "sampling_seed": seed}
    return {"input_ids": [5, 9, 3 + seed % 7], "sampling_params": plain | sampling, "return_logprob": True}


async def ask_all(client: SglangClient, bodies: list[dict[str, Any]]) -> list[list[int]]:
    answers = await asyncio.gather(*(client.generate(each, 120) for each in bodies))
    return [answer["output_ids"] for answer in answers]


@pytest.mark.sglang
def test_a_response_does_not_depend_on_greedy_or_truncated_neighbours(sglang_fleet: ServerFleet) -> None:
    thread = EventLoopThread("test")
    client = SglangClient(sglang_fleet.endpoints[0])
    plain = [body(seed) for seed in range(NUM_REQUESTS)]
    try:
        alone = thread.run(ask_all(client, plain))
        assert len({tuple(ids) for ids in alone}) == NUM_REQUESTS
        for other in OTHERS:
            # Longer than the others, so that one is in the batch all the time.
            neighbours = [body(900 + number, **{**other, "max_new_tokens": 200}) for number in range(3)]
            beside = thread.run(ask_all(client, [*neighbours, *plain]))[len(neighbours) :]
            assert beside == alone, f"beside {other}"
        for other in OTHERS[1:4]:  # a truncated request keeps to its tokens, and to its seed
            one, many = body(7, **other), [body(7, **other), *plain, body(8, temperature=0)]
            assert thread.run(ask_all(client, [one]))[0] == thread.run(ask_all(client, many))[0]
    finally:
        thread.run(client.close())
        thread.close()


class Sampler:
    """Stands for SGLang's module: shows from which probabilities a batch is drawn."""

    drawn: torch.Tensor

    def __init__(self) -> None:
        self.__dict__["top_k_top_p_min_p_sampling_from_probs_torch"] = lambda *_, **__: pytest.fail("not asked for")

    def sampling_from_probs_torch(self, probs: torch.Tensor, **_: Any) -> torch.Tensor:
        self.drawn = probs.clone()
        return probs.argmax(-1)


def test_each_row_keeps_its_own_tokens_in_the_order_of_ids() -> None:
    sampler: Any = Sampler()
    draw_in_order_of_ids(sampler)
    row = [0.1, 0.4, 0.2, 0.25, 0.05]
    top_ks, top_ps, min_ps = [5, 1, 2, 5, 5], [1.0, 1.0, 1.0, 0.6, 1.0], [0.0, 0.0, 0.0, 0.0, 0.5]
    sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        torch.tensor([row] * 5),
        torch.tensor(top_ks),
        torch.tensor(top_ps),
        torch.tensor(min_ps),
        True,
        torch.arange(5),
        torch.arange(5),
        max_top_k=5,
    )
    kept = [[index for index, value in enumerate(values) if value > 0] for values in sampler.drawn.tolist()]
    assert kept == [[0, 1, 2, 3, 4], [1], [1, 3], [1, 3], [1, 2, 3]]
