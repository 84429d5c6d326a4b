"""Parses a function h(t) from text such as "log((t + 0.05) / (1 - t + 0.05))", without evaluating the text as Python.

A tokenizer and a recursive-descent parser build a tree of unevaluated sympy objects, so that sympy never computes with
large numbers. `evaluate` then walks the tree in floating point. This is the grammar:

    sum     := product (("+" | "-") product)*
    product := unary (("*" | "/") unary)*
    unary   := ("+" | "-") unary | power
    power   := atom (("^" | "**") unary)?
    atom    := number | "t" | "p" | "pi" | "(" sum ")" | function "(" sum ("," sum)* ")"
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_CHARACTERS = 500
MAX_DEPTH = 40
TOKEN = re.compile(
    r"[ \t]*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z]+)|(?P<mark>\*\*|[-+*/^(),]))"
)
# Our name -> (sympy's class, its value in floating point, the number of arguments or None for two and more).
FUNCTIONS: dict[str, tuple[str, Callable[..., float], int | None]] = {
    "log": ("log", math.log, 1),
    "exp": ("exp", math.exp, 1),
    "sin": ("sin", math.sin, 1),
    "cos": ("cos", math.cos, 1),
    "tan": ("tan", math.tan, 1),
    "asin": ("asin", math.asin, 1),
    "acos": ("acos", math.acos, 1),
    "atan": ("atan", math.atan, 1),
    "sinh": ("sinh", math.sinh, 1),
    "cosh": ("cosh", math.cosh, 1),
    "tanh": ("tanh", math.tanh, 1),
    "abs": ("Abs", abs, 1),
    "min": ("Min", min, None),
    "max": ("Max", max, None),
}
VALUES = {sympy_name: function for sympy_name, function, _ in FUNCTIONS.values()}
GRAMMAR = f"use t, numbers, pi, + - * / ^ ( ) and sqrt, {', '.join(FUNCTIONS)}"


@dataclass(frozen=True, slots=True)
class Expression:
    text: str
    tree: Any  # sympy, unevaluated

    def __call__(self, t: float) -> float:
        """Returns h(t), or nan if h has no real value at t."""
        try:
            return evaluate(self.tree, t)
        except (ValueError, OverflowError, ZeroDivisionError):  # log(0), exp(1000), 0^-1
            return math.nan


def parse_expression(text: str) -> Expression:
    """Raises ValueError, one line that names the place, for anything outside the grammar."""
    if not text.strip():
        raise ValueError(f"h is empty: {GRAMMAR}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"h has {len(text)} characters: write it with {MAX_CHARACTERS} at most")
    parser = Parser(tokenize(text))
    tree = parser.sum()
    if parser.place < len(parser.tokens):
        raise parser.unexpected()
    if not tree.free_symbols:
        raise ValueError(f"h={text.strip()!r} does not depend on t: write a function of t")
    return Expression(text.strip(), tree)


def tokenize(text: str) -> list[tuple[str, str, int]]:
    """Returns the tokens: (kind, text, position of the first character, counted from 1) of each."""
    tokens, place = [], 0
    while text[place:].strip(" \t"):
        found = TOKEN.match(text, place)
        if found is None:
            place = place + len(text[place:]) - len(text[place:].lstrip(" \t"))
            raise ValueError(f"h: {text[place]!r} at character {place + 1} is not in the grammar: {GRAMMAR}")
        kind = str(found.lastgroup)
        tokens.append((kind, found[kind], found.start(kind) + 1))
        place = found.end()
    return tokens


@dataclass(slots=True)
class Parser:
    tokens: list[tuple[str, str, int]]
    place: int = 0
    depth: int = 0
    sympy: Any = field(init=False)

    def __post_init__(self) -> None:
        import sympy  # The import takes half a second; only objective=expression needs it.

        self.sympy = sympy

    @property
    def next(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ""

    def unexpected(self) -> ValueError:
        if self.place == len(self.tokens):
            return ValueError(f"h ends too early: {GRAMMAR}")
        _, text, character = self.tokens[self.place]
        return ValueError(f"h: {text!r} at character {character} is not in the grammar: {GRAMMAR}")

    def take(self, *expected: str) -> str:
        if self.next not in expected:
            raise self.unexpected()
        self.place += 1
        return self.tokens[self.place - 1][1]

    def sum(self) -> Any:
        tree = self.product()
        while self.next in ("+", "-"):
            is_minus = self.take("+", "-") == "-"
            term = self.product()
            tree = self.sympy.Add(tree, self.negative(term) if is_minus else term, evaluate=False)
        return tree

    def product(self) -> Any:
        tree = self.unary()
        while self.next in ("*", "/"):
            is_division = self.take("*", "/") == "/"
            factor = self.unary()
            if is_division:
                factor = self.sympy.Pow(factor, self.sympy.Integer(-1), evaluate=False)
            tree = self.sympy.Mul(tree, factor, evaluate=False)
        return tree

    def unary(self) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"h is nested more than {MAX_DEPTH} deep: write it flatter")
        if self.next in ("+", "-"):
            is_minus = self.take("+", "-") == "-"
            tree = self.unary()
            tree = self.negative(tree) if is_minus else tree
        else:
            tree = self.power()
        self.depth -= 1
        return tree

    def power(self) -> Any:
        base = self.atom()
        if self.next not in ("^", "**"):
            return base
        self.take("^", "**")
        return self.sympy.Pow(base, self.unary(), evaluate=False)

    def atom(self) -> Any:
        if self.place == len(self.tokens):
            raise self.unexpected()
        kind, text, character = self.tokens[self.place]
        if kind == "number":
            self.place += 1
            if not math.isfinite(float(text)):
                raise ValueError(f"h: the number at character {character} is too large: write a smaller one")
            return self.sympy.Float(float(text))
        if text == "(":
            self.take("(")
            tree = self.sum()
            self.take(")")
            return tree
        if text in ("t", "p", "pi"):
            self.place += 1
            return self.sympy.pi if text == "pi" else self.sympy.Symbol("t", real=True)
        if text == "sqrt" or text in FUNCTIONS:
            self.place += 1
            return self.call(text, self.arguments(), character)
        raise self.unexpected()

    def arguments(self) -> list[Any]:
        self.take("(")
        arguments = [self.sum()]
        while self.take(",", ")") == ",":
            arguments.append(self.sum())
        return arguments

    def call(self, name: str, arguments: list[Any], character: int) -> Any:
        sympy_name, _, arity = FUNCTIONS.get(name, ("", None, 1))
        if len(arguments) != arity and not (arity is None and len(arguments) >= 2):
            wanted = arity or "two or more"
            raise ValueError(f"h: {name} at character {character} takes {wanted} arguments, got {len(arguments)}")
        if name == "sqrt":
            return self.sympy.Pow(arguments[0], self.sympy.Rational(1, 2), evaluate=False)
        return getattr(self.sympy, sympy_name)(*arguments, evaluate=False)

    def negative(self, tree: Any) -> Any:
        return self.sympy.Mul(self.sympy.Integer(-1), tree, evaluate=False)


def evaluate(tree: Any, t: float) -> float:
    """Returns the tree's value as a float. Raises ValueError, OverflowError or ZeroDivisionError if it has none."""
    if tree.is_Symbol:
        return t
    if tree.is_Number or tree.is_NumberSymbol:
        return float(tree)
    arguments = [evaluate(argument, t) for argument in tree.args]
    if tree.is_Add:
        return sum(arguments)
    if tree.is_Mul:
        return math.prod(arguments)
    if tree.is_Pow:
        return math.pow(*arguments)
    return float(VALUES[tree.func.__name__](*arguments))
