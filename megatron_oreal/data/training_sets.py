r"""Converts rows of public training sets to prompts.

math:       MATH (Hendrycks et al. 2021), rows {"problem", "level", "type", "solution"}; the answer is the solution's
            last box. The type becomes a tag.
dapo:       DAPO-Math-17k, rows {"prompt": [{"role", "content"}], "reward_model": {"ground_truth"}}. The published file
            repeats each question a hundred times; the repeats are left out, and so are the instructions around the
            question.
deepscaler: DeepScaleR-Preview, rows {"problem", "answer", "solution"}.
big_math:   Big-Math-RL-Verified, rows {"problem", "answer", "domain", "llama8b_solve_rate"}; the rate, measured with
            Llama 3.1 8B, becomes the pass rate, and the domains become tags.
fields:     any rows, by the names of their columns.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from megatron_oreal.data.examples import Example
from megatron_oreal.data.files import Row, describe_type
from megatron_oreal.data.prompts import parse_messages, parse_text
from megatron_oreal.rewards.answer import extract_answer
from megatron_oreal.types import Message

# A few of MATH's solutions write \boxed 5 without braces.
BARE_BOX = re.compile(r"\\boxed\s+([^\s${}]+?)\s*(?:\$|\.?\s*$)")
DAPO_HEAD = re.compile(
    r"\s*Solve the following math problem step by step\.\s+The last line of your response should be of the form "
    r"Answer: .{1,60}? is the answer to the problem\.\s*"
)
DAPO_TAIL = re.compile(r"(?<!\s)\s*Remember to put your answer on its own line after \"Answer:\"[^\n]*(?:\n\s*)?\Z")


def require_object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError("the row is not of this format; choose the FORMAT that fits the file")
    return value


def solved_math_row(row: Any) -> Row:
    found = require_object(row)
    return {"prompt": parse_text(found, "problem"), "answer": math_answer(found), "tags": parse_tags(found, "type")}


def math_example(row: Any) -> Example:
    """Returns the unchanged solution as an example; it ends with its answer in a box."""
    found = require_object(row)
    math_answer(found)
    return Example((Message("user", parse_text(found, "problem")),), parse_text(found, "solution"))


def math_answer(row: Row) -> str:
    solution = parse_text(row, "solution")
    boxed = extract_answer(solution)
    if boxed.status == "found" and boxed.text is not None:
        return boxed.text
    bare = BARE_BOX.findall(solution)
    if not bare:
        raise ValueError(r"solution has no \boxed{...}, from which the answer is taken")
    return str(bare[-1])


def dapo_row(row: Any) -> Row:
    found = require_object(row)
    messages = [
        {"role": message.role, "content": without_instructions(message.content)} for message in parse_messages(found)
    ]
    if not all(message["content"].strip() for message in messages):
        raise ValueError("prompt holds no question between its instructions")
    judged = found.get("reward_model")
    if not isinstance(judged, dict):
        raise ValueError(f'reward_model must be {{"ground_truth": answer}}, not {describe_type(judged)}')
    return {"prompt": messages, "answer": parse_text(judged, "ground_truth")}


def dapo_repeat_key(row: Any) -> object:
    """Returns a key that all repeats of one question share: everything that the prompt is made of."""
    prompt, judged = (row.get("prompt"), row.get("reward_model")) if isinstance(row, dict) else (row, None)
    return repr(prompt), repr(judged.get("ground_truth") if isinstance(judged, dict) else judged)


def without_instructions(text: str) -> str:
    """Removes the sentences that ask for a last line "Answer: ...": the verifier looks for a box."""
    head = DAPO_HEAD.match(text)
    question = text[head.end() :] if head else text
    return DAPO_TAIL.sub("", question).strip() if head else DAPO_TAIL.sub("", question)


def deepscaler_row(row: Any) -> Row:
    found = require_object(row)
    return {"prompt": parse_text(found, "problem"), "answer": parse_text(found, "answer")}


def big_math_row(row: Any) -> Row:
    found = require_object(row)
    return {
        "prompt": parse_text(found, "problem"),
        "answer": parse_text(found, "answer"),
        "pass_rate": parse_rate(found.get("llama8b_solve_rate")),
        "tags": parse_tags(found, "domain"),
    }


def parse_rate(value: object) -> object:
    """Returns the rate, or None for NaN or an empty text, which stand for a rate that was not measured."""
    if isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            return value  # `parse_prompt` refuses it
    return None if isinstance(value, float) and math.isnan(value) else value


def parse_tags(row: Row, key: str) -> list[str]:
    """Returns the texts of a column that holds a list of texts, one text, or none."""
    value = row.get(key)
    tags = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{key} must be a text or a list of texts")
    return [tag for tag in tags if tag.strip()]


@dataclass(slots=True, frozen=True)
class Columns:
    """Names the columns of any table; a dot leads into a nested value: reward_model.ground_truth, messages.0.content.

    `question` may also hold a list of {"role", "content"}.
    """

    question: str
    answer: str
    pass_rate: str | None = None
    tags: str | None = None

    def to_row(self, row: Any) -> Row:
        found = require_object(row)
        question = pick(found, self.question)
        prompt = question if isinstance(question, list) else parse_text({self.question: question}, self.question)
        answer = pick(found, self.answer)
        if isinstance(answer, (list, dict)):
            inner = f"{self.answer}.0" if isinstance(answer, list) else f"{self.answer}.{next(iter(answer), 'KEY')}"
            raise ValueError(f"{self.answer} holds {describe_type(answer)}; name what is in it, such as {inner}")
        return {
            "prompt": prompt,
            "answer": parse_text({self.answer: answer}, self.answer),
            "pass_rate": parse_rate(pick(found, self.pass_rate)) if self.pass_rate else None,
            "tags": parse_tags({self.tags: pick(found, self.tags)}, self.tags) if self.tags else [],
        }


def pick(row: Row, name: str) -> Any:
    """Returns the value of a column or of a dotted name. Raises ValueError that names the missing part."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(f"there is no column {name!r}")
    return value
