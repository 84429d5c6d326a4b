"""Measures the held-out accuracy of the engine's policy, with greedy and with sampled answers.

`evaluate` measures during training; `evaluate_datasets` is `megatron-oreal eval`, with more numbers and every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_oreal.config import EvalRunConfig
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.evaluation.results import (
    AnswerRecord,
    QuestionRecord,
    format_results,
    questions_path,
    read_questions,
    summarize,
    write_questions,
    write_results,
)
from megatron_oreal.parallel.collectives import broadcast_object
from megatron_oreal.rewards.answer import answer_key
from megatron_oreal.run.open import open_eval
from megatron_oreal.run.run import EvalRun
from megatron_oreal.types import Group, Sample


def evaluate_datasets(config: EvalRunConfig) -> str | None:
    """Answers all questions of all datasets and returns the tables to print, on the first rank.

    A dataset whose RUN_DIR/questions/NAME.jsonl is there is finished and not asked again. RUN_DIR/results.json holds
    what the tables show.
    """
    with open_eval(config) as run:
        answers_each = config.eval.greedy + config.eval.num_samples
        for name in config.eval.prompts:
            if is_finished(run, name):
                run.progress.note(f"{name}: finished before")
                run.progress.advance(len(run.datasets[name]) * answers_each)
                continue
            questions = answer_questions(run, name)
            if run.layout.is_main:
                write_questions(questions_path(config.run_dir, name), questions)
        return write_summary(run) if run.layout.is_main else None


def is_finished(run: EvalRun, name: str) -> bool:
    """Returns whether the dataset's file exists. Only the first rank looks; other nodes may not see the folder."""
    finished = False
    if run.layout.is_main:
        path = questions_path(run.config.run_dir, name)
        finished = path.is_file() and holds_answers_to(read_questions(path), run.datasets[name], name)
    return broadcast_object(finished)


def holds_answers_to(questions: Sequence[QuestionRecord], prompts: Sequence[EncodedPrompt], name: str) -> bool:
    """Returns True, or raises ValueError when the file answers other questions than the dataset now has."""
    asked = [(question.id, question.prompt, question.answer) for question in questions]
    if asked != [(p.prompt.id, p.prompt.messages[-1].content, p.prompt.answer) for p in prompts]:
        raise ValueError(
            f"eval.prompts.{name} is not the file that this run_dir was evaluated on; "
            "give another run_dir or another name"
        )
    return True


def answer_questions(run: EvalRun, name: str) -> list[QuestionRecord]:
    """Answers the questions batch by batch, so that the progress bar moves; every rank gets the same records."""
    config, prompts, records = run.config.eval, run.datasets[name], []
    for start in range(0, len(prompts), config.prompts_per_batch):
        batch = prompts[start : start + config.prompts_per_batch]
        seed = f"{run.config.seed}/eval/{name}/{start}"
        greedy: list[Group] | list[None] = [None] * len(batch)
        samples: list[list[Sample]] = [[] for _ in batch]
        if config.greedy:
            greedy = run.sampler.sample(batch, 1, replace(run.sampling, temperature=0.0), seed)
        if config.num_samples:
            groups = run.sampler.sample(batch, config.num_samples, run.sampling, seed)
            samples = [group.samples for group in groups]
        for prompt, group, sampled in zip(batch, greedy, samples, strict=True):
            records.append(question_record(prompt, group.samples[0] if group else None, sampled, config.keep_responses))
        run.progress.advance(len(batch) * (config.greedy + config.num_samples), dataset=name)
    return records


def question_record(
    prompt: EncodedPrompt, greedy: Sample | None, samples: Sequence[Sample], keep_responses: bool
) -> QuestionRecord:
    first_with: dict[str, int] = {}
    votes = [
        None if key is None else first_with.setdefault(key, number)
        for number, key in enumerate(map(sample_key, samples))
    ]
    return QuestionRecord(
        id=prompt.prompt.id,
        prompt=prompt.prompt.messages[-1].content,
        answer=prompt.prompt.answer,
        greedy=answer_record(greedy, None, keep_responses) if greedy is not None else None,
        samples=[answer_record(s, vote, keep_responses) for s, vote in zip(samples, votes, strict=True)],
    )


def sample_key(sample: Sample) -> str | None:
    """Returns what the sample votes for, its answer in one spelling, or None where it has no answer."""
    verdict = sample.verdict
    if verdict is None or verdict.extracted is None:
        return None
    return answer_key(verdict.extracted)


def answer_record(sample: Sample, vote: int | None, keep_response: bool) -> AnswerRecord:
    verdict = sample.verdict
    return AnswerRecord(
        is_correct=sample.is_correct,
        is_judged=sample.is_judged,
        status=verdict.status if verdict else "",
        extracted=verdict.extracted if verdict else None,
        vote=vote,
        num_tokens=len(sample.response_ids),
        finish_reason=sample.finish_reason,
        response=sample.response_text if keep_response else None,
    )


def write_summary(run: EvalRun) -> str:
    config = run.config
    summaries = {
        name: summarize(read_questions(questions_path(config.run_dir, name)), config.eval) for name in run.datasets
    }
    write_results(config.run_dir / "results.json", config.model.path, summaries, run.notes)
    return format_results(summaries, config.eval.confidence)
