"""Measures tokens a second of the local rollout engine, beside transformers' `model.generate` in the same run.

    OMP_NUM_THREADS=1 python tools/bench/bench_local_engine.py --prompts 64 --group-size 8 --max-new-tokens 36

The model is a random Qwen2 of the quickstart's size. Three rivals alternate, so that a busy machine slows all of them:
the engine with its own decoder, the engine's loop over transformers' forward pass, and `model.generate` with its
dynamic cache. Each is measured with every response at full length, and with one stop token.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2ForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's module path lacks the checkout's root

from examples.tiny_model import tiny_config, write_random_model
from megatron_oreal.engines.engine import GenerationRequest, SamplingParams
from megatron_oreal.engines.local.engine import LocalEngine
from megatron_oreal.engines.local.transformers_decoder import TransformersDecoder

STOP_TOKEN_ID = 5


def make_model(path: Path, hidden: int, layers: int, vocab_size: int) -> PreTrainedModel:
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden}
    config = tiny_config(vocab_size=vocab_size, max_position_embeddings=4096, pad_token_id=0, **shape)
    write_random_model(path, config, seed=0)
    return Qwen2ForCausalLM.from_pretrained(path).eval()


def engine_rival(engine: LocalEngine, requests: list[GenerationRequest], params: SamplingParams) -> Callable[[], int]:
    def run() -> int:
        return sum(len(generation.response_ids) for generation in engine.generate(requests, params))

    return run


def generate_rival(
    model: PreTrainedModel, requests: list[GenerationRequest], params: SamplingParams
) -> Callable[[], int]:
    prompt_ids = torch.from_numpy(np.stack([request.prompt_ids for request in requests])).long()

    def run() -> int:
        outputs = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=list(params.stop_token_ids) or None,
            pad_token_id=0,
        )
        is_stop = torch.isin(outputs[:, prompt_ids.shape[1] :], torch.tensor(params.stop_token_ids)).int()
        return int((is_stop.cumsum(dim=1) - is_stop == 0).sum())  # up to the first stop token, included

    return run


def measure(rivals: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Returns the tokens a second of every round, after one warm-up round."""
    speeds: dict[str, list[float]] = {name: [] for name in rivals}
    for round_number in range(repeats + 1):
        for name, run in rivals.items():
            start = time.perf_counter()
            num_tokens = run()
            if round_number:
                speeds[name].append(num_tokens / (time.perf_counter() - start))
    return speeds


@click.command()
@click.option("--prompts", "num_prompts", default=64, show_default=True)
@click.option("--group-size", default=8, show_default=True)
@click.option("--prompt-tokens", default=8, show_default=True)
@click.option("--max-new-tokens", default=36, show_default=True)
@click.option("--batch-size", default=512, show_default=True, help="Of the engine; model.generate takes all at once.")
@click.option("--hidden", default=64, show_default=True)
@click.option("--layers", default=3, show_default=True)
@click.option("--vocab-size", default=24, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--repeats", default=7, show_default=True)
def main(
    num_prompts: int,
    group_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    hidden: int,
    layers: int,
    vocab_size: int,
    threads: int,
    repeats: int,
) -> None:
    """Prints median, least and most tokens a second of each rival, and its ratio to model.generate."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    prompts = torch.randint(vocab_size, (num_prompts, prompt_tokens)).tolist()
    requests = [
        GenerationRequest(prompt, number * group_size + sample)
        for number, prompt in enumerate(prompts)
        for sample in range(group_size)
    ]
    cpu, float32 = torch.device("cpu"), torch.float32
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory), hidden, layers, vocab_size)
        engine = LocalEngine(Path(directory), cpu, float32, batch_size)
        general = LocalEngine(Path(directory), cpu, float32, batch_size)
        general.decoder = TransformersDecoder(Path(directory), cpu, float32)
    print(f"CPU, {threads} thread(s), float32, torch {torch.__version__}; {len(requests)} sequences, {repeats} rounds")
    for stop_token_ids in ((), (STOP_TOKEN_ID,)):
        params = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids)
        rivals = {
            "model.generate": generate_rival(model, requests, params),
            "engine, transformers' forward": engine_rival(general, requests, params),
            "engine": engine_rival(engine, requests, params),
        }
        speeds = measure(rivals, repeats)
        reference = statistics.median(speeds["model.generate"])
        print("with one stop token" if stop_token_ids else "without stop tokens")
        for name, values in speeds.items():
            median = statistics.median(values)
            spread = f"[{min(values):.0f}, {max(values):.0f}]"
            print(f"  {name:30s} {median:9.0f} tokens/s  {spread}  {median / reference:.2f} x")


if __name__ == "__main__":
    main()
