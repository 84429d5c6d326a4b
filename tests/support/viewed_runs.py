"""Makes run directories for the viewer: random texts in rows of a run's format."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

SOURCES = ("gsm8k", "math", "dapo")
SENTENCES = (
    "Let us write \\(x = {}\\) and look at both sides.",
    "Then \\[ {}x^2 + {}x - {} = 0, \\] so the discriminant is positive.",
    "Wait, I should check the case \\(n = {}\\) as well.",
    "Adding {} and {} gives {}, which is what we need.\n",
    "Therefore the sum of the digits is {}.\n\n",
)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(**changes: object) -> dict[str, object]:
    """Returns a row of a run's rollouts, with the test's changes."""
    return {
        "group": 0,
        "prompt_id": "p0",
        "source": "math",
        "prompt": "What is 1 + 1?",
        "answer": "2",
        "response": "It is \\boxed{2}.",
        "status": "correct",
        "extracted": "2",
        "reward": 1.0,
        "num_tokens": 5,
        "logprob": -1.5,
        "finish_reason": "stop",
        "policy_version": 0,
    } | changes


def write_run(
    folder: Path,
    num_steps: int,
    groups_per_step: int = 64,
    group_size: int = 8,
    response_tokens: int = 500,
    recorded_groups: int = 0,
) -> Path:
    """Writes a run with random responses of about `response_tokens` words each; every second one has a judge's opinion.

    The run records the tokens of the first `recorded_groups` groups of each step.
    """
    rng = random.Random(0)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run_dir: here\n")
    for step in range(num_steps):
        rows, recorded = [], []
        for group in range(groups_per_step):
            pass_rate, answer = rng.random(), str(rng.randrange(1000))
            prompt = " ".join(draw_sentence(rng) for _ in range(3)) + " Find the answer."
            for _ in range(group_size):
                words = draw_words(rng, int(response_tokens * rng.uniform(0.3, 1.7)))
                rows.append(draw_row(rng, step, group, prompt, answer, words, rng.random() < pass_rate))
                if group < recorded_groups:
                    recorded.append(draw_tokens(rng, len(rows) - 1, words))
        write_rows(folder / "rollouts" / f"step_{step:06d}.jsonl", rows)
        if recorded:
            write_rows(folder / "rollout_tokens" / f"step_{step:06d}.jsonl", recorded)
    return folder


def draw_sentence(rng: random.Random) -> str:
    sentence = rng.choice(SENTENCES)
    return sentence.replace("{}", "%d") % tuple(rng.randrange(100) for _ in range(sentence.count("{}")))


def draw_words(rng: random.Random, count: int) -> list[str]:
    words: list[str] = []
    while len(words) < count:
        words += [f"{word} " for word in draw_sentence(rng).split(" ")]
    return words[:count]


def draw_row(
    rng: random.Random, step: int, group: int, prompt: str, answer: str, words: list[str], is_correct: bool
) -> dict[str, object]:
    found = answer if is_correct else str(rng.randrange(1000))
    status = "correct" if is_correct else rng.choice(["incorrect"] * 8 + ["no_answer", "timeout"])
    judged: dict[str, object] = {"judge": {"status": rng.choice([status, "correct"])}} if rng.random() < 0.5 else {}
    return (
        row(
            group=group,
            prompt_id=f"{step}-{group}",
            source=SOURCES[group % len(SOURCES)],
            prompt=prompt,
            answer=answer,
            response="".join(words) + f"\\boxed{{{found}}}",
            status=status,
            extracted=found if status != "no_answer" else None,
            reward=float(is_correct),
            num_tokens=len(words) + 1,
            logprob=-round(rng.expovariate(0.05), 6),
            policy_version=step,
        )
        | judged
    )


def draw_tokens(rng: random.Random, number: int, words: list[str]) -> dict[str, object]:
    return {
        "row": number,
        "texts": [*words, "\\boxed{}"],
        "logprobs": [-round(rng.expovariate(2.0), 4) for _ in range(len(words) + 1)],
        "differences": [round(rng.gauss(0, 0.01), 5) for _ in range(len(words) + 1)],
        "weights": [round(rng.random(), 3) for _ in range(len(words) + 1)],
        "advantages": [rng.choice([-0.5, 0.5])],
    }
