from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rewards.hostile_input import is_hostile
from megatron_oreal.rewards.spelling import normalize
from megatron_oreal.types import Verdict
from tests.support.hostile_answers import ENDLESS, ENDLESS_ANSWER, SLOW_REFERENCE


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
    (r"\sqrt{2}", "1.414214"),
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
    ("1.414214", r"\sqrt{2}"),
    ("(x+y+z+w)^{999}", "x+1"),
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


def test_the_screen_looks_at_the_text_before_and_after_it_is_normalised(verifier: MathVerifier) -> None:
    only_before, only_after = "x+5\x0b", "x+10⁹⁹⁹⁹⁹"
    assert is_hostile(only_before) and not is_hostile(normalize(only_before))
    assert not is_hostile(only_after) and is_hostile(normalize(only_after))
    for text in (only_before, only_after):
        assert (
            verifier.verify(rf"\boxed{{{text}}}".replace(only_before, only_before + "+y"), "y+1").status == "rejected"
        )


def test_a_reference_that_the_screen_refuses_is_only_compared_by_spelling() -> None:
    with MathVerifier() as verifier:
        assert verifier.verify(boxed("x"), "9^{9^{9^9}}").status == "incorrect"
        assert verifier.verify(boxed(r"\sum_{k=1}^n k"), r"\sum_{k=1}^{n} k").status == "correct"
        assert verifier.verify(boxed("n(n+1)/2"), r"\sum_{k=1}^n k").status == "incorrect"
        assert verifier.pool.workers == {}


def test_long_answers_have_a_verdict(verifier: MathVerifier) -> None:
    """Two well-formed answers below 10,000 characters end in neither a crash nor a timeout."""
    polynomials = ["+".join(f"{index}x^{{{index}}}" for index in range(1, count)) for count in (90, 900)]
    for answer in (*polynomials, "1" * 9999, ", ".join(map(str, range(1700)))):
        for prediction in (answer, answer + "+1", "x"):
            assert verifier.verify(boxed(prediction), answer).is_judged
    assert verifier.verify(boxed(polynomials[0] + "+x-x"), polynomials[0]).status == "correct"


def test_a_timeout_is_no_verdict_but_many_of_them_are() -> None:
    others = [ENDLESS.replace("11y", f"{number}y") for number in (12, 13)]
    pairs = [(boxed(ENDLESS), ENDLESS_ANSWER), (boxed("x"), ENDLESS_ANSWER), (boxed("5"), "5")]
    with MathVerifier(2, cpu_seconds=0.5, max_timeouts=1) as verifier:
        assert [verdict.status for verdict in verifier.verify_many(pairs)] == ["timeout", "incorrect", "correct"]
        verdicts = verifier.verify_many(pairs + [(boxed(other), ENDLESS_ANSWER) for other in others])
    assert [verdict.status for verdict in verdicts] == ["rejected", "incorrect", "correct", "rejected", "rejected"]
    with MathVerifier(2, cpu_seconds=0.5, max_timeouts=0) as verifier:
        assert verifier.verify(*pairs[0]) == Verdict(0.0, "rejected", ENDLESS)


def test_the_samples_of_a_slow_reference_are_never_wrong_for_it() -> None:
    with MathVerifier(1, cpu_seconds=0.3, max_timeouts=0) as verifier:
        verdicts = verifier.verify_many([(boxed(f"x+{number}"), SLOW_REFERENCE) for number in range(8)])
    assert {(verdict.status, verdict.reward) for verdict in verdicts} == {("timeout", 0.0)}


def test_a_crash_is_no_verdict() -> None:
    with MathVerifier(1, cpu_seconds=60.0) as verifier:
        verifier.verify(boxed("x+1"), "1+x")
        is_over = threading.Event()

        def kill_workers() -> None:
            while not is_over.wait(0.1):
                for worker in list(verifier.pool.workers.values()):
                    worker.process.kill()

        killer = threading.Thread(target=kill_workers)
        killer.start()
        try:
            verdict = verifier.verify(boxed(ENDLESS), ENDLESS_ANSWER)
        finally:
            is_over.set()
            killer.join()
        assert verdict == Verdict(0.0, "crash", ENDLESS)
        assert not verdict.is_judged
        assert verifier.verify(boxed("x+2"), "2+x").status == "correct"


def test_the_bound_of_timeouts_is_checked() -> None:
    with pytest.raises(ValueError, match=r"verifier\.max_timeouts"):
        MathVerifier(max_timeouts=-1)


def test_plain_answers_start_no_process() -> None:
    with MathVerifier() as verifier:
        verifier.verify_many([(boxed("5"), "5"), (boxed("1/2"), "0.5"), (boxed("9^9^9"), "5"), ("", "5")])
        assert verifier.pool.workers == {}


def test_order_and_verdicts_do_not_depend_on_the_number_of_workers() -> None:
    pairs = [(boxed(prediction), answer) for prediction, answer in EQUAL + DIFFERENT]
    pairs += [("", "5"), (boxed(ENDLESS), ENDLESS_ANSWER), (boxed("5"), "5"), *reversed(pairs)]
    verdicts = []
    for num_workers in (1, 3):
        with MathVerifier(num_workers, cpu_seconds=1.0) as verifier:
            verdicts.append(verifier.verify_many(pairs))
    assert verdicts[0] == verdicts[1]
    num_cases = len(EQUAL) + len(DIFFERENT)
    statuses = [verdict.status for verdict in verdicts[0]]
    first = ["correct"] * len(EQUAL) + ["incorrect"] * len(DIFFERENT)
    assert statuses == [*first, "no_answer", "timeout", "correct", *reversed(first)]
    assert verdicts[0][num_cases + 1] == Verdict(0.0, "timeout", ENDLESS)
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
