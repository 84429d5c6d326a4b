from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_oreal.rewards import MathVerifier
from megatron_oreal.types import Verdict


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(num_workers=1, cpu_seconds=3.0) as verifier:
        yield verifier


def boxed(answer: str) -> str:
    return rf"Therefore the answer is \boxed{{{answer}}}."


EQUAL = [
    (r"\frac12", "0.5"),
    ("2, 1", "1,2"),
    (r"\{2, 1\}", "1,2"),
    (r"\{1,2\}", r"\{ 2, 1 \}"),
    ("(0.5, 3)", r"\left(\frac{1}{2}, 3\right)"),
    (r"(0.6,\frac83]", r"\left(\frac{3}{5},\frac{8}{3}\right]"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"-2 \le x \le 7", "[-2,7]"),
    (r"(3, \infty) \cup (-\infty, 2)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"\sqrt{12}", r"2\sqrt3"),
    (r"1 - \sqrt{19}, 1 + \sqrt{19}", r"1 \pm \sqrt{19}"),
    ("-5i+6", "6-5i"),
    ("2(k+1)", "2k+2"),
    (r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}"),
    (r"\frac{\cos x}{\sin x}", r"\cot x"),
    ("y=2x+3", "2x+3"),
    ("10x-14y+22z+8=0", "5x - 7y + 11z + 4 = 0"),
    ("5!", "120"),
    ("1.414214", r"\sqrt{2}"),
    ("x^{99}(x+1)", "x^{100}+x^{99}"),
    (r"\lambda + 1", r"1 + \lambda"),
]
DIFFERENT = [
    ("(3,4)", "(3,4]"),
    ("(2,1)", "(1,2)"),
    ("1,2,3", "1,2"),
    ("y=5", "x=5"),
    ("x+1", "y+1"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    (r"\frac{1}{2^{99}\pi}", r"\frac{1}{2^{98}\pi}"),
    ("0.0", r"\frac{\pi}{10^7}"),
    (r"10\sqrt{2}\%", r"10\sqrt{2}"),
    (r"10\%, 20\%", "10, 20"),
    ("so 3x + 4y + 5", "5"),
    ("the answer is 5", "5"),
    ("5 or 6", "5"),
]


@pytest.mark.parametrize(("prediction", "answer"), EQUAL)
def test_equivalent_answers(verifier: MathVerifier, prediction: str, answer: str) -> None:
    assert verifier.verify(boxed(prediction), answer) == Verdict(1.0, "correct", prediction)


@pytest.mark.parametrize(("prediction", "answer"), DIFFERENT)
def test_different_answers(verifier: MathVerifier, prediction: str, answer: str) -> None:
    assert verifier.verify(boxed(prediction), answer) == Verdict(0.0, "incorrect", prediction)


def test_nearby_boxes_are_not_merged(verifier: MathVerifier) -> None:
    response = r"\boxed{\sqrt{2}} and \boxed{\sqrt{3}}"
    assert verifier.verify(response, r"\sqrt{2}, \sqrt{3}").status == "incorrect"
    assert verifier.verify(response, r"\sqrt3").status == "correct"


def test_what_is_no_answer_has_its_own_status(verifier: MathVerifier) -> None:
    assert verifier.verify("5", "5") == Verdict(0.0, "no_answer", None)
    assert verifier.verify(r"\boxed{5} so \boxed{", "5") == Verdict(0.0, "no_answer", None)
    assert verifier.verify(boxed("1" * 1001), "5").status == "too_long"
    assert verifier.verify(boxed("(" * 51 + "5" + ")" * 51), "5").status == "rejected"
    assert verifier.verify(boxed("9^9^9^9"), "5") == Verdict(0.0, "rejected", "9^9^9^9")


def test_no_answer_runs_as_code(verifier: MathVerifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in ("open('x','w')", "open(x, w)", "__import__('os').mkdir('x')"):
        assert verifier.verify(boxed(code), "5").status == "rejected"
    assert not list(tmp_path.iterdir())


def test_plain_answers_start_no_process() -> None:
    with MathVerifier() as verifier:
        verifier.verify_many([(boxed("5"), "5"), (boxed("1/2"), "0.5"), (boxed("9^9^9"), "5"), ("", "5")])
        assert verifier.pool.workers == {}


def test_order_and_verdicts_do_not_depend_on_the_number_of_workers() -> None:
    endless = "(x+y+z+w)^{999}"
    pairs = [(boxed(prediction), answer) for prediction, answer in EQUAL + DIFFERENT]
    pairs += [("", "5"), (boxed(endless), "x+1"), (boxed("5"), "5"), *reversed(pairs)]
    verdicts = []
    for num_workers in (1, 3):
        with MathVerifier(num_workers, cpu_seconds=1.0) as verifier:
            verdicts.append(verifier.verify_many(pairs))
    assert verdicts[0] == verdicts[1]
    num_cases = len(EQUAL) + len(DIFFERENT)
    statuses = [verdict.status for verdict in verdicts[0]]
    first = ["correct"] * len(EQUAL) + ["incorrect"] * len(DIFFERENT)
    assert statuses == [*first, "no_answer", "timeout", "correct", *reversed(first)]
    assert verdicts[0][num_cases + 1] == Verdict(0.0, "timeout", endless)
    assert not verdicts[0][num_cases + 1].is_judged


def test_close_leaves_no_process() -> None:
    with MathVerifier(num_workers=2) as verifier:
        verifier.verify_many([(boxed("2(k+1)"), "2k+2"), (boxed("2(k+3)"), "2k+6")])
        pids = [worker.process.pid for worker in verifier.pool.workers.values()]
        assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_references_are_checked(verifier: MathVerifier) -> None:
    assert verifier.verify(boxed("5"), r"\boxed{5}").status == "correct"
    assert verifier.verify_many([]) == []
    for answer in ("", "  ", "$$", "1" * 10_001):
        with pytest.raises(ValueError, match="answer must"):
            verifier.verify(boxed("5"), answer)
