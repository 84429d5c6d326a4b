"""Random models with the shapes of Qwen2.5, and what a run of one computes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_oreal.types import Group, Prompt, Sample, Verdict


@dataclass(frozen=True, slots=True)
class ModelShape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Counts the parameters of all layers' matrices: query, key, value, output, and the MLP's three."""
        head_size = self.hidden // self.heads
        attention = self.hidden * head_size * (2 * self.heads + 2 * self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def forward_flops(self, lengths: Sequence[int], num_logprobs: int) -> float:
        """Counts operations of a forward pass over sequences of `lengths`; `num_logprobs` tokens meet the vocabulary.

        2 operations a parameter and token; causal attention: 2 products of length^2 / 2 x hidden a layer.
        """
        attention = sum(2 * length * length * self.hidden * self.layers for length in lengths)
        head = 2 * self.vocabulary * self.hidden * num_logprobs
        return 2.0 * self.layer_parameters * sum(lengths) + attention + head


SHAPES = {
    "tiny": ModelShape(64, 96, 2, 4, 2, 512),
    "0.5b": ModelShape(896, 4864, 24, 14, 2, 151936),
    "1.5b": ModelShape(1536, 8960, 28, 12, 2, 151936),
}


def write_model(shape: ModelShape, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A random model as a Hugging Face directory, unless it is there."""
    if (folder / "config.json").is_file():
        return
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a group's prompt and of each of its responses: equal within a group, so that totals do not depend on
    which samples the algorithm selects."""

    prompt: int
    response: int


def draw_lengths(num_groups: int, rng: random.Random, scale: float) -> list[Lengths]:
    """Draws lengths of a task with short answers and a long tail: about 160 and 410 tokens, at most 1024."""
    return [
        Lengths(
            prompt=max(2, int(rng.uniform(80, 240) * scale)),
            response=max(2, int(min(1024.0, rng.lognormvariate(5.9, 0.5)) * scale)),
        )
        for _ in range(num_groups)
    ]


def make_groups(
    prompts: Sequence[Prompt], lengths: Sequence[Lengths], group_size: int, vocabulary: int, rng: random.Random
) -> list[Group]:
    """Random tokens; every second sample is correct."""
    groups = []
    for prompt, each in zip(prompts, lengths, strict=True):
        prompt_ids = [rng.randrange(3, vocabulary) for _ in range(each.prompt)]
        samples = [
            Sample(
                prompt_id=prompt.id,
                prompt_ids=prompt_ids,
                response_ids=[rng.randrange(3, vocabulary) for _ in range(each.response)],
                response_text="",
                rollout_logprobs=[-11.0] * each.response,
                model_logprobs=[-11.0] * each.response,
                finish_reason="stop",
                policy_version=0,
                verdict=Verdict(1.0, "correct", "1") if number % 2 else Verdict(0.0, "incorrect", "0"),
            )
            for number in range(group_size)
        ]
        groups.append(Group(prompt, samples))
    return groups
