"""Measures answers a second of `MathVerifier`, beside math-verify without and with its timeouts, in one run.

    python tools/bench/bench_verifier.py   # ratios; the goal is >= 3 on the easy mix, >= 1 on the hard one
    python tools/bench/bench_verifier.py --rounds 7 --workers 2

The easy mix resembles most samples: numbers, fractions, short expressions, many of them spelled like the reference.
The hard mix needs algebra for each answer. The rivals run in this process on the same boxed answers, alternately and in
an order that changes each round, so that a busy machine slows all of them. math-verify without timeouts has no
protection; its timeouts are the protection that a trainer in one process could use. Finally, two workers judge 1,024
samples, one in a hundred of them hostile, measured in wall-clock seconds.
"""

from __future__ import annotations

import functools
import logging
import random
import statistics
import time
from collections.abc import Callable, Sequence

import click
from math_verify import LatexExtractionConfig, parse, verify

from megatron_oreal.rewards import MathVerifier

Pair = tuple[str, str]  # response, reference answer
EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
HOSTILE = [
    "9^{9^{9^9}}",
    "100000!",
    r"\sum_{k=1}^{10^9} k",
    "(x+y+z+w)^{999}",
    r"\sin(" * 40 + "x" + ")" * 40,
    "(x+1)^{9999}",
    "|x" * 150 + "|" * 150,
    "x_" * 300 + "x",
    "1," * 490 + "2",
    r"\binom{x}{y}" * 60,
]


def response(answer: str) -> str:
    return rf"We add both sides and find what was asked, so the answer is $\boxed{{{answer}}}$."


def easy_mix(count: int, seed: int) -> list[Pair]:
    """Returns groups of eight samples a prompt, half of them correct, like those of a policy."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    while len(pairs) < count:
        number, other = rng.randint(2, 9999), rng.randint(2, 97)
        answer, right, wrong = rng.choice(
            [
                (str(number), [str(number), f"{number}.0", rf"{number}\text{{ cm}}"], [str(number + 1), f"-{number}"]),
                (
                    rf"\frac{{{number}}}{{{other}}}",
                    [rf"\dfrac{{{number}}}{{{other}}}", f"{number}/{other}"],
                    [str(other)],
                ),
                (rf"({number}, {other})", [rf"\left({number},{other}\right)"], [f"({other},{number})", str(number)]),
                (rf"{other}\sqrt{{{number}}}", [rf"{other} \sqrt{{{number}}}"], [rf"{other}\sqrt{{{number + 1}}}"]),
                (f"x^2+{other}x+{number}", [f"x^2 + {other}x + {number}"], [f"x^2 - {other}x + {number}"]),
                (rf"\text{{{rng.choice(['east', 'odd', 'Friday'])}}}", [r"\text{east}", "odd"], [r"\text{Monday}"]),
            ]
        )
        for place in range(8):
            pairs.append((response(rng.choice(right if place % 2 else wrong)), answer))
    return pairs[:count]


def hard_mix(count: int, seed: int) -> list[Pair]:
    """Returns pairs that are equal or nearly equal, and never spelled alike."""
    rng = random.Random(seed)
    pairs: list[Pair] = []
    while len(pairs) < count:
        a, b, c = (rng.randint(2, 40) for _ in range(3))
        delta = rng.choice([0, 1])  # wrong by one in half of the cases
        pairs.append(
            rng.choice(
                [
                    (response(f"(x+{a})(x+{b + delta})"), f"x^2+{a + b}x+{a * b}"),
                    (
                        response(rf"\frac{{1}}{{\sqrt{{{a}}}+{b + delta}}}"),
                        rf"\frac{{\sqrt{{{a}}}-{b}}}{{{a}-{b * b}}}",
                    ),
                    (response(rf"{c}\sin^2 x + {c + delta}\cos^2 x"), f"{c}"),
                    (response(rf"(-\infty, {a}) \cup ({a + b + delta}, \infty)"), rf"x<{a} \text{{ or }} x>{a + b}"),
                    (response(rf"\log_{{{a}}} {b + delta}"), rf"\frac{{\ln {b}}}{{\ln {a}}}"),
                    (response(f"{a * c}x - {b * c}y = {c * (a + delta)}"), f"{a}x-{b}y={a}"),
                    (
                        response(rf"\frac{{{a}}}{{x-{b}}} + \frac{{{c}}}{{x+{b + delta}}}"),
                        rf"\frac{{{a}(x+{b})+{c}(x-{b})}}{{(x-{b})(x+{b})}}",
                    ),
                    (response(f"2^{{{100 + a}}} - 2^{{{99 + a + delta}}}"), f"2^{{{99 + a}}}"),
                ]
            )
        )
    return pairs


def math_verify_judge(timeout_seconds: int | None) -> Callable[[Sequence[Pair]], None]:
    parse_boxed = functools.partial(parse, extraction_config=EXTRACTION, parsing_timeout=timeout_seconds)

    def judge(pairs: Sequence[Pair]) -> None:
        for text, answer in pairs:
            verify(parse_boxed(rf"\boxed{{{answer}}}"), parse_boxed(text), timeout_seconds=timeout_seconds)

    return judge


def measure(
    rivals: dict[str, Callable[[Sequence[Pair]], object]],
    mix: Callable[[int, int], list[Pair]],
    rounds: int,
    count: int,
) -> dict[str, list[float]]:
    """Returns each rival's answers a second by round. Each round has new answers, so that no cache helps."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds):
        names = list(rivals)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            pairs = mix(count, number)
            started = time.perf_counter()
            rivals[name](pairs)
            rates[name].append(len(pairs) / (time.perf_counter() - started))
    return rates


def report(name: str, rates: dict[str, list[float]]) -> None:
    ours = rates["MathVerifier"]
    click.echo(f"{name} mix:")
    for rival, values in rates.items():
        ratio = statistics.median(mine / other for mine, other in zip(ours, values, strict=True))
        shown = "" if rival == "MathVerifier" else f", MathVerifier is {ratio:.2f} times as fast (median of rounds)"
        click.echo(f"  {rival}: {statistics.median(values):.0f} answers/s{shown}")


def judge_with_hostile_samples(count: int) -> None:
    rng = random.Random(0)
    pairs = easy_mix(count // 2, 1000) + hard_mix(count - count // 2, 1000)
    for place in rng.sample(range(count), count // 100):
        pairs[place] = (response(rng.choice(HOSTILE)), pairs[place][1])
    with MathVerifier(num_workers=2) as verifier:
        started = time.perf_counter()
        verdicts = verifier.verify_many(pairs)
        seconds = time.perf_counter() - started
    num_unjudged = sum(not verdict.is_judged for verdict in verdicts)
    click.echo(f"{count} samples, {count // 100} of them hostile: {seconds:.1f} s, {num_unjudged} without a verdict")


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--count", default=512, show_default=True, help="Answers a round and rival; an eighth of the hard mix.")
@click.option("--workers", default=1, show_default=True, help="Of MathVerifier; the rivals have one process.")
def main(rounds: int, count: int, workers: int) -> None:
    """Prints answers a second and ratios."""
    logging.disable(logging.WARNING)
    with MathVerifier(num_workers=workers) as verifier:
        verifier.verify_many(hard_mix(64, -1))  # starts the workers
        rivals = {
            "MathVerifier": verifier.verify_many,
            "math-verify": math_verify_judge(None),
            "math-verify with timeouts": math_verify_judge(5),
        }
        report("easy", measure(rivals, easy_mix, rounds, count))
        report("hard", measure(rivals, hard_mix, rounds, max(8, count // 8)))
    judge_with_hostile_samples(1024)


if __name__ == "__main__":
    main()
