"""The algebra of the worker processes: our own exact comparison, and math-verify for what that does not read."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from megatron_oreal.rewards import equality
from megatron_oreal.rewards.expression import NotAnExpression, difference, parse_expression

UNREAD = re.compile(r"\\text|\\[lcdv]?dots|'|\?")  # what math-verify leaves out
Fallback = Callable[[str, str], bool]  # (prediction, reference), LaTeX


class ExactAlgebra:
    """`fallback` decides where one side is no expression for us; without one such answers are different."""

    def __init__(self, fallback: Fallback | None = None) -> None:
        self.fallback = fallback

    def equal(self, prediction: str, reference: str) -> bool:
        try:
            return equality.are_equal(prediction, reference)
        except NotAnExpression:
            # Only matrices: whatever else we do not read may be anything.
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
    """math-verify on two boxes, without timeouts; imported here, because it takes half a second."""
    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    # The box is all we send, so only boxes are looked for: no "last number in the text".
    extraction = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def parse_boxed(latex: str) -> list[Any]:
        return list(parse(rf"\boxed{{{latex}}}", extraction, parsing_timeout=None))

    # The samples of a group share their reference answer.
    parse_reference = functools.lru_cache(maxsize=256)(parse_boxed)

    def are_equal(prediction: str, reference: str) -> bool:
        """The order matters to math-verify: it follows the reference's form."""
        gold, candidate = parse_reference(reference), parse_boxed(prediction)
        # Numbers are ours to compare: math-verify rounds them.
        if not all(forms and isinstance(forms[0], (sympy.Basic, sympy.MatrixBase)) for forms in (gold, candidate)):
            return False
        if any(isinstance(forms[0], sympy.Expr) and forms[0].is_number for forms in (gold, candidate)):
            return False
        return bool(verify(gold, candidate, numeric_precision=50, allow_set_relation_comp=True, timeout_seconds=None))

    return are_equal
