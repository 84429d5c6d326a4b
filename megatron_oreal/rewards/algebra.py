"""Compares expressions in the worker processes: exactly where our parser reads them, else by math-verify."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from megatron_oreal.rewards import equality
from megatron_oreal.rewards.expression import NotAnExpression, difference, parse_expression

UNREAD = re.compile(r"\\text|\\[lcdv]?dots|'|\?")  # text that math-verify ignores
Fallback = Callable[[str, str], bool]  # (prediction, reference), LaTeX


class ExactAlgebra:
    """`fallback` decides if our parser cannot read one side; without a fallback, such answers are different."""

    def __init__(self, fallback: Fallback | None = None) -> None:
        self.fallback = fallback

    def equal(self, prediction: str, reference: str) -> bool:
        try:
            return equality.are_equal(prediction, reference)
        except NotAnExpression:
            # Only matrices get here: any other text that our parser cannot read has no known meaning.
            has_matrix = all(r"\begin" in text and not UNREAD.search(text) for text in (prediction, reference))
            return has_matrix and self.fallback is not None and self.fallback(prediction, reference)

    def equations_agree(self, prediction: tuple[str, str], reference: tuple[str, str], same_sign: bool) -> bool:
        try:
            one = difference(*equality.parse_alike(*prediction))
            other = difference(*equality.parse_alike(*reference))
        except NotAnExpression:
            return False
        ratio = equality.constant_ratio(one, other)
        return ratio == "positive" if same_sign else ratio is not None

    def solve(self, left: str, right: str) -> str | None:
        try:
            root = equality.linear_root(difference(parse_expression(left), parse_expression(right)))
        except NotAnExpression:
            return None
        if root is None:
            return None
        return rf"\frac{{{root.value.numerator}}}{{{root.value.denominator}}}"

    def order_key(self, text: str) -> float | None:
        return equality.order_key(text)


def math_verify_fallback() -> Fallback:
    """Returns math-verify's comparison of two boxes, without timeouts. Imported here, which takes half a second."""
    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    # We send nothing but a box, so math-verify looks for boxes only, not for the last number in the text.
    extraction = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def parse_boxed(latex: str) -> list[Any]:
        return list(parse(rf"\boxed{{{latex}}}", extraction, parsing_timeout=None))

    # The samples of a group share their reference answer.
    parse_reference = functools.lru_cache(maxsize=256)(parse_boxed)

    def are_equal(prediction: str, reference: str) -> bool:
        """Passes the reference first: math-verify's result depends on the order of the two."""
        gold, candidate = parse_reference(reference), parse_boxed(prediction)
        # Our own comparison decides numbers, because math-verify rounds them.
        if not all(forms and isinstance(forms[0], (sympy.Basic, sympy.MatrixBase)) for forms in (gold, candidate)):
            return False
        if any(isinstance(forms[0], sympy.Expr) and forms[0].is_number for forms in (gold, candidate)):
            return False
        return bool(verify(gold, candidate, numeric_precision=50, allow_set_relation_comp=True, timeout_seconds=None))

    return are_equal
