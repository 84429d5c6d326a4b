"""Asks a judge, a language model behind an OpenAI-compatible API, to compare an answer with the reference answer.

Each request has temperature 0 and asks about one answer. A reply counts only if it gives one of two words, on a line
of its own and after any reasoning. Every other reply, and every failed request, gives the opinion "failed".
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_oreal.config import JudgeConfig
from megatron_oreal.config.verifier import PLACEHOLDERS
from megatron_oreal.observability.closing import Closing
from megatron_oreal.rewards.failures import FailureNotes
from megatron_oreal.rewards.json_client import JsonClient, RequestError
from megatron_oreal.rewards.judge_cache import JudgeCache
from megatron_oreal.types import JudgeOpinion, Metrics, Notify

SETTING = "verifier.judge"
END_OF_REASONING = "</think>"
DECORATION = " \t*_`\"'.:!#"
KEPT_CHARACTERS = 500  # characters of a reply that the file of opinions keeps
FILLED = re.compile(rf"\{{({'|'.join(PLACEHOLDERS)})\}}")
# Text that servers tokenize as control tokens: <|im_end|>, </s>, <think>, <｜User｜>, [INST].
CONTROL_TOKEN = re.compile(r"<(?=[|｜/\w])|\[(?=/?[A-Z_]{3,}\])")


@dataclass(slots=True, frozen=True)
class JudgeQuestion:
    """Example: `JudgeQuestion("What is 1/2 + 1/4?", "\\frac{3}{4}", "75 \\text{ percent}")`."""

    question: str
    reference: str
    answer: str  # the student's, as the rules extracted it


class ReplyError(Exception):
    """Signals that the server's answer holds no opinion; the message says why."""


class Judge(Closing):
    """Asks the judge. Any thread may call `ask_many`; equal requests run once, on the client's event loop."""

    def __init__(self, config: JudgeConfig, cache_path: Path, notify: Notify) -> None:
        """Raises ValueError for a missing API key, or if the configured file does not hold opinions."""
        self.config = config
        path = "/chat/completions" if config.api == "chat" else "/completions"
        self.cache = JudgeCache(config.cache or cache_path, notify)
        self.cache.check()
        self.client = JsonClient(config.url.rstrip("/") + path, config, SETTING)
        self.under_way: dict[str, asyncio.Task[JudgeOpinion]] = {}
        self.failures = FailureNotes("the judge gave no opinion on", notify)

    def check(self) -> None:
        """Asks a simple question. Raises a one-line ValueError if the server does not answer as a judge does."""
        body = request_body(self.config, JudgeQuestion("What is 1 + 1?", "2", "2"))
        try:
            is_accepted, _ = read_opinion(self.client.run(self.client.post(body)), self.config)
        except (RequestError, ReplyError) as error:
            raise ValueError(
                f"{SETTING}: asked whether 2 equals 2, {self.config.model!r} at {self.config.url} gave no opinion: "
                f"{error}"
            ) from None
        if not is_accepted:
            raise ValueError(
                f"{SETTING}: asked whether 2 equals 2, {self.config.model!r} at {self.config.url} said "
                f"{self.config.reject_word}; check its prompt and its two words"
            )

    def ask_many(self, questions: Sequence[JudgeQuestion]) -> list[JudgeOpinion]:
        """Returns an opinion on each answer, in the given order; "failed" if the judge gave none."""
        return self.client.run(self._ask_many(questions)) if questions else []

    def flush_metrics(self) -> Metrics:
        """Returns counts since the last call. They depend on the file and the server; the verdicts do not."""
        return self.client.flush_metrics("time/judge")

    def close(self) -> None:
        self.client.close()
        self.cache.close()

    async def _ask_many(self, questions: Sequence[JudgeQuestion]) -> list[JudgeOpinion]:
        return await asyncio.gather(*map(self._ask, questions))

    async def _ask(self, question: JudgeQuestion) -> JudgeOpinion:
        key = question_key(self.config, question)
        task = self.under_way.get(key)
        if task is None:
            task = self.under_way[key] = asyncio.ensure_future(self._find_or_ask(key, question))
            task.add_done_callback(lambda _: self.under_way.pop(key))
        return await task

    async def _find_or_ask(self, key: str, question: JudgeQuestion) -> JudgeOpinion:
        is_accepted = await self.cache.find(key)
        if is_accepted is not None:
            self.client.counts["cached"] += 1
        else:
            try:
                payload = await self.client.post(request_body(self.config, question))
                is_accepted, reply = read_opinion(payload, self.config)
            except (RequestError, ReplyError) as error:
                self.client.counts["failed"] += 1
                self.failures.add(str(error))
                return "failed"
            is_accepted = await self.cache.add(key, is_accepted, reply[-KEPT_CHARACTERS:])
        return "correct" if is_accepted else "incorrect"


def request_body(config: JudgeConfig, question: JudgeQuestion) -> dict[str, Any]:
    text = fill_prompt(config.prompt, question)
    body: dict[str, Any] = {"model": config.model, "temperature": config.temperature, "max_tokens": config.max_tokens}
    if config.api == "chat":
        system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        body["messages"] = [*system, {"role": "user", "content": text}]
    else:
        body["prompt"] = text
    body |= config.extra
    return {name: value for name, value in body.items() if value is not None}


def fill_prompt(prompt: str, question: JudgeQuestion) -> str:
    """Replaces all placeholders in one pass, so that text of an answer is never read as a placeholder."""
    values = {
        "question": without_control_tokens(question.question),
        "reference": on_one_line(question.reference),
        "answer": on_one_line(question.answer),
    }
    return FILLED.sub(lambda match: values[match[1]], prompt)


def on_one_line(text: str) -> str:
    """Puts an answer on one line, because text on a new line could look like part of the prompt."""
    return " ".join(without_control_tokens(text).split())


def without_control_tokens(text: str) -> str:
    """Inserts a space after each bracket that may begin a control token of a chat template."""
    return CONTROL_TOKEN.sub(lambda match: match[0] + " ", text)


def question_key(config: JudgeConfig, question: JudgeQuestion) -> str:
    """Returns a digest of the opinion's inputs: the request, the API and the two words, but not the address."""
    parts = [request_body(config, question), config.api, config.accept_word, config.reject_word]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_opinion(payload: Any, config: JudgeConfig) -> tuple[bool, str]:
    """Returns whether the judge accepts the answer, and the reply. Raises ReplyError without one clear opinion."""
    text = reply_text(payload, config)
    _, mark, rest = text.rpartition(END_OF_REASONING)
    if not mark and "<think>" in rest:
        raise ReplyError("the reply ends within its reasoning")
    words = {bare(config.accept_word): True, bare(config.reject_word): False}
    lines = [line for line in map(bare, rest.splitlines()) if line]
    opinions = {words[line] for line in lines if line in words}
    if not lines or lines[-1] not in words or len(opinions) != 1:
        shown = " ".join(rest.split())[-80:]
        raise ReplyError(f"the reply is neither {config.accept_word} nor {config.reject_word}: {shown!r}")
    return opinions.pop(), text


def bare(line: str) -> str:
    """Returns a word in lower case, without Markdown and punctuation around it."""
    return line.strip(DECORATION).casefold()


def reply_text(payload: Any, config: JudgeConfig) -> str:
    choices = payload.get("choices") if isinstance(payload, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ReplyError("the server's JSON has no single choice")
    choice = choices[0]
    if choice.get("finish_reason") not in ("stop", None):
        raise ReplyError(f"the reply ended by {choice['finish_reason']!r} and not by itself; perhaps raise max_tokens")
    message = choice.get("message")
    if config.api == "completions":
        text = choice.get("text")
    else:
        text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise ReplyError("the server's choice holds no text")
    return text
