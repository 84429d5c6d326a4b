"""Tokens a second of the local engine on a random model, 16 responses a prompt, none of which ends early."""

from __future__ import annotations

import random
import time
from pathlib import Path

import click

from megatron_oreal.engines.engine import GenerationRequest, SamplingParams
from tools.gpu.findings import Recorder
from tools.gpu.model_run import GROUP_SIZE, ModelRun, opened, synchronize
from tools.gpu.random_model import SHAPES

PROMPT_TOKENS = 150


def make_requests(rows: int, prompt_tokens: int) -> list[GenerationRequest]:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 60) for _ in range(prompt_tokens)] for _ in range(-(-rows // GROUP_SIZE))]
    return [GenerationRequest(prompts[row // GROUP_SIZE], seed=row) for row in range(rows)]


def measure(model: ModelRun, recorder: Recorder, rows: int, new_tokens: int, prompt_tokens: int) -> None:
    requests = make_requests(rows, prompt_tokens)
    for top_p, tokens in ((1.0, new_tokens), (0.9, max(1, new_tokens // 4))):
        synchronize()
        start = time.perf_counter()
        found = model.run.engine.generate(requests, SamplingParams(top_p=top_p, max_new_tokens=tokens))
        synchronize()
        seconds = time.perf_counter() - start
        made = sum(len(each.response_ids) for each in found)
        recorder.note(f"{rows} rows, top_p {top_p:g}", made / seconds, "tokens/s")
        recorder.note(f"{rows} rows, top_p {top_p:g}, a token of all rows", 1e3 * seconds / tokens, "ms")


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="generate")
@click.option("--size", type=click.Choice(list(SHAPES)), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--rows", default=256)
@click.option("--new-tokens", default=128)
@click.argument("settings", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def main(
    findings: Path, step: str, size: str, work: Path, rows: int, new_tokens: int, settings: tuple[str, ...]
) -> None:
    """Pushes the policy's weights to the engine, then generates."""
    recorder = Recorder(findings, step)
    with opened(size, work, num_prompts=2, settings=settings, rows=rows) as model:
        synchronize()
        start = time.perf_counter()
        model.run.push_weights(1)
        synchronize()
        recorder.note("weights to the engine", time.perf_counter() - start, "s")
        measure(model, recorder, rows, new_tokens, 8 if size == "tiny" else PROMPT_TOKENS)


if __name__ == "__main__":
    main()
