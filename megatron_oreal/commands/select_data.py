"""Chooses training data from an evaluation's answers (RUN_DIR/questions/NAME.jsonl of `megatron-oreal eval`).

    megatron-oreal select-data responses QUESTIONS --prompts prompts.jsonl --out sft.jsonl
    megatron-oreal select-data prompts QUESTIONS --prompts tagged.jsonl --count 1000 --out train.jsonl

The first keeps verified answers for supervised fine-tuning; the second draws prompts whose "tags" are often failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from megatron_oreal.data.examples import Example, write_examples
from megatron_oreal.data.files import read_jsonl, write_jsonl
from megatron_oreal.data.prompts import read_prompts
from megatron_oreal.data.round_selection import AnsweredPrompt, resample_by_tags, select_responses, tag_failure_rates
from megatron_oreal.evaluation.results import read_questions

FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def main() -> None:
    """Chooses training data from an evaluation's answers."""


@main.command()
@click.argument("questions", type=FILE)
@click.option("--prompts", required=True, type=FILE, help="The prompts that were asked.")
@click.option("--out", required=True, type=FILE, help="The examples to write, for `megatron-oreal sft`.")
@click.option("--per-prompt", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--max-pass-rate", default=1.0, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True)
def responses(questions: Path, prompts: Path, out: Path, per_prompt: int, max_pass_rate: float, seed: int) -> None:
    """Writes the correct answers, distinct and at most so many a prompt."""

    def work() -> str:
        asked = {prompt.id: prompt for prompt in read_prompts(prompts, "--prompts")}
        selected = select_responses(read_answers(questions), per_prompt, max_pass_rate, seed)
        unknown = next((id_ for id_, _ in selected if id_ not in asked), None)
        if unknown is not None:
            raise ValueError(f"--prompts: {prompts} lacks the prompt {unknown!r} of {questions}; give the file asked")
        if not selected:
            raise ValueError(f"QUESTIONS: {questions} holds no correct answer to keep; raise --max-pass-rate")
        count = write_examples(out, (Example(asked[id_].messages, text) for id_, text in selected))
        return f"{out}: {count} correct answers to {len({id_ for id_, _ in selected})} prompts"

    reporting(work)


@main.command(name="prompts")
@click.argument("questions", type=FILE)
@click.option("--prompts", required=True, type=FILE, help='Prompts with "tags", those that were asked among them.')
@click.option("--count", required=True, type=click.IntRange(min=1), help="Prompts to draw.")
@click.option("--out", required=True, type=FILE, help="The prompts to write.")
@click.option("--seed", default=0, show_default=True)
def resample(questions: Path, prompts: Path, count: int, out: Path, seed: int) -> None:
    """Draws prompts in proportion to how often their tags were failed."""

    def work() -> str:
        rows = {str(row.get("id")): row for _, row in read_jsonl(prompts, "--prompts")}
        tags = {id_: row.get("tags", []) for id_, row in rows.items()}
        if not all(isinstance(value, list) and all(isinstance(tag, str) for tag in value) for value in tags.values()):
            raise ValueError(f"--prompts: {prompts}: tags must be lists of strings")
        rates = tag_failure_rates(read_answers(questions), tags)
        drawn = resample_by_tags(rates, tags, count, seed)
        write_jsonl(out, (rows[id_] for id_ in drawn))
        worst = ", ".join(f"{tag} {rate:.2f}" for tag, rate in sorted(rates.items(), key=lambda item: -item[1])[:5])
        return f"{out}: {count} prompts; most failed tags: {worst}"

    reporting(work)


def read_answers(path: Path) -> list[AnsweredPrompt]:
    if not path.is_file():
        raise ValueError(f"QUESTIONS: {path} does not exist; give RUN_DIR/questions/NAME.jsonl of an evaluation")
    answered = []
    for question in read_questions(path):
        judged = [sample for sample in question.samples if sample.is_judged]
        if any(sample.response is None for sample in judged):
            raise ValueError(f"QUESTIONS: {path} holds no responses; evaluate with eval.keep_responses=true")
        answered.append(AnsweredPrompt(question.id, tuple((str(s.response), s.is_correct) for s in judged)))
    return answered


def reporting(work: Callable[[], str]) -> None:
    try:
        click.echo(work())
    except (ValueError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
