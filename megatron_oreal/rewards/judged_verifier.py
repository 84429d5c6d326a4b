"""Asks a judge about the answers that the rules do not accept; the judge's opinion decides those.

The reference code of OREAL (arXiv:2502.06781) rewards a response that the rules or a language model accept. It treats
an answer as wrong if the judge fails; here such a sample has the status "judge_failed" and no training uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from megatron_oreal.config import AnswerRule
from megatron_oreal.observability.closing import Closing
from megatron_oreal.rewards.answer import ANSWER_REGIONS
from megatron_oreal.rewards.judge import Judge, JudgeQuestion
from megatron_oreal.rewards.math_verifier import MathVerifier
from megatron_oreal.types import JudgeOpinion, Metrics, Prompt, Verdict

SHOWN_CHARACTERS = 2000  # characters of a response's end that the judge sees if there is no answer


class JudgedVerifier(Closing):
    """Applies the rules first, and then the judge."""

    def __init__(self, rules: MathVerifier, judge: Judge, answer_rule: AnswerRule = "last_box") -> None:
        self.rules, self.judge, self.config = rules, judge, judge.config
        self.region = ANSWER_REGIONS[answer_rule]

    @property
    def num_concurrent(self) -> int:
        """Returns enough groups to keep all requests busy, because each group waits for the judge's answers."""
        return self.rules.num_concurrent + self.config.max_concurrent_requests

    def verify_responses(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        verdicts = self.rules.verify_responses(prompt, responses)
        shown = [self._shown(verdict, response) for verdict, response in zip(verdicts, responses, strict=True)]
        asked = {number: text for number, text in enumerate(shown) if self._is_asked(prompt, verdicts[number], text)}
        questions = [JudgeQuestion(prompt.question, prompt.answer, text) for text in asked.values()]
        for number, opinion in zip(asked, self.judge.ask_many(questions), strict=True):
            verdicts[number] = combine(verdicts[number], opinion, self.config.audit_overrules)
        return verdicts

    def check(self) -> None:
        self.judge.check()

    def flush_metrics(self) -> Metrics:
        return self.judge.flush_metrics()

    def close(self) -> None:
        self.judge.close()
        self.rules.close()

    def _shown(self, verdict: Verdict, response: str) -> str:
        """Returns the text that the judge sees: the extracted answer, or the end of the response."""
        if verdict.extracted is not None and verdict.status != "no_answer":
            return verdict.extracted
        return self.region(response)[-SHOWN_CHARACTERS:]

    def _is_asked(self, prompt: Prompt, verdict: Verdict, shown: str) -> bool:
        if not shown.strip():
            return False
        if verdict.status == "correct":
            return is_audited(prompt, shown, self.config.audit_share)
        return verdict.status in self.config.asks_about


def is_audited(prompt: Prompt, answer: str, share: float) -> bool:
    """Returns whether the judge audits this accepted answer; a digest of the answer selects the audited share."""
    text = "\0".join([prompt.question, prompt.answer, answer])
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def combine(rules: Verdict, opinion: JudgeOpinion, audit_overrules: bool) -> Verdict:
    """Returns the verdict after the opinion. An audit changes an accepted answer only with `audit_overrules`."""
    told = replace(rules, rules=rules.status, judge=opinion)
    if rules.status == "correct" and (opinion == "correct" or not audit_overrules):
        return told
    if opinion == "correct":
        return replace(told, reward=1.0, status="correct")
    if opinion == "failed":
        return replace(told, reward=0.0, status="judge_failed")
    # The rules could not decide the answer, or the audit overrules them; the judge says that the answer is incorrect.
    return told if rules.status in ("incorrect", "no_answer") else replace(told, reward=0.0, status="incorrect")
