r"""Converts rows of public benchmarks to questions with a reference answer; for evaluation only.

math500:        MATH-500, rows {"problem", "answer"}.
aime24, aime25: rows {"problem" | "Problem" | "question", "answer" | "Answer"}, as their several publishers spell them.
olympiadbench:  its text-only open-ended parts, rows {"question", "context", "final_answer": [...]}; the tolerance that
                numerical answers may have ("error", one of the 675 of English mathematics) is not used: answers are
                compared exactly.
livemathbench:  rows {"question", "answer", "options" (of choices)}.
gpqa:           rows {"Question", "Correct Answer", "Incorrect Answer 1" to 3, "Record ID"}; the options are shuffled,
                for each question always in the same way, because the correct one comes first.
mmlu_pro:       rows {"question", "options", "answer" (a letter)}; "answer_index" is not used, because in one of the
                12032 it names another option than the letter, by which the benchmark is judged.

For multiple choice, the prompt lists the options as "A. ...", and the letter is the answer.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from megatron_oreal.data.files import Row
from megatron_oreal.data.prompts import parse_text

CHOICE_REQUEST = "Answer with the letter of the correct option."
GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
NO_OPTION = "N/A"  # MMLU-Pro pads its options with it


def math_row(row: Row) -> Row:
    return {"prompt": parse_text(row, "problem"), "answer": parse_text(row, "answer")}


def aime_row(row: Row) -> Row:
    question = parse_text(row, first_key(row, ("problem", "Problem", "question")))
    return {"prompt": question, "answer": parse_text(row, first_key(row, ("answer", "Answer")))}


def olympiadbench_row(row: Row) -> Row:
    """Joins several final answers into one list. Raises ValueError for questions with images and for proofs."""
    question, context = parse_text(row, "question"), row.get("context")
    if "<img_" in question or row.get("image_1") is not None:
        raise ValueError("question has an image; import the text-only part, OE_TO_*")
    answers = row.get("final_answer")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("final_answer must be a list of strings; import the open-ended part, OE_*")
    prompt = f"{context.strip()}\n\n{question}" if isinstance(context, str) and context.strip() else question
    return {"prompt": prompt, "answer": ", ".join(answers)}


def livemathbench_row(row: Row) -> Row:
    question, options = parse_text(row, "question"), row.get("options")
    if options:
        question = "\n".join([question, *parse_options(options)])  # The options already have their letters.
    return {"prompt": question, "answer": parse_text(row, "answer")}


def gpqa_row(row: Row) -> Row:
    question = parse_text(row, "Question").strip()
    options = [parse_text(row, key).strip() for key in GPQA_OPTIONS]
    order = list(range(len(options)))
    # Python derives the seed from the string's SHA-512, so no Python version or hash seed changes it.
    random.Random(f"gpqa/{row.get('Record ID') or question}").shuffle(order)
    return choice_row(question, [options[index] for index in order], order.index(0))


def mmlu_pro_row(row: Row) -> Row:
    options = parse_options(row.get("options"))
    while options and options[-1] == NO_OPTION:
        options.pop()
    letter = parse_text(row, "answer")
    correct = string.ascii_uppercase.find(letter)
    if len(letter) != 1 or not 0 <= correct < len(options):
        raise ValueError(f"answer {letter!r} must be the letter of one of the {len(options)} options")
    return choice_row(parse_text(row, "question").strip(), options, correct)


def choice_row(question: str, options: Sequence[str], correct: int) -> Row:
    letters = string.ascii_uppercase[: len(options)]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return {"prompt": "\n".join([question, "", *lines, "", CHOICE_REQUEST]), "answer": letters[correct]}


def parse_options(value: object) -> list[str]:
    if not isinstance(value, list) or not 2 <= len(value) <= 26 or not all(isinstance(item, str) for item in value):
        raise ValueError("options must be a list of 2 to 26 strings")
    return [item.strip() for item in value]


def first_key(row: Row, keys: Sequence[str]) -> str:
    """Returns the first of these keys that the row has, or the first key if it has none."""
    return next((key for key in keys if key in row), keys[0])
