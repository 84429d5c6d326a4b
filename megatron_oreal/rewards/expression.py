r"""Parses one mathematical expression in normalised LaTeX into a tree, without evaluating it.

`2x^2+\sin 30^\circ` becomes nested `Expression`s. The parser raises NotAnExpression for any other text (a list, an
equation, words), so that the caller can try another reading. It takes time linear in the text.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_oreal.rewards.vocabulary import (
    DECORATIONS,
    FUNCTIONS,
    LIST_FUNCTIONS,
    NO_SYMBOLS,
    STARTS_OF_FACTORS,
    TRIGONOMETRIC,
)

MAX_TOKENS = 1500
MAX_DEPTH = 120  # of calls of `sum`; the caller rejects text nested over 50 deep

INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
TOKEN = re.compile(
    r"""\s*(?:
    (?P<repeating>\d*\.\d*\\(?:overline|bar|dot)\s?(?:\{\d+\}|\d)(?:\d*\\dot\s?\{?\d\}?)?)
    |(?P<scientific>(?<![a-zA-Z\d])\d+(?:\.\d+)?[eE][+-]?\d{1,4}(?![\da-zA-Z.]))
    |(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
    |(?P<text>\\text\{[^{}]*\})
    |(?P<command>\\[a-zA-Z]+)
    |(?P<percent>\\%)
    |(?P<brace>\\[{}])
    |(?P<letter>[^\W\d_])
    |(?P<mark>[-+/^_!|(){}\[\],':])
    )\s*""",
    re.VERBOSE,
)
REPEATING = re.compile(r"(?P<whole>\d*)\.(?P<fixed>\d*)\\(?:overline|bar|dot)\s?(?P<rest>.*)")


class NotAnExpression(ValueError):
    """Signals that the text is not one expression, or exceeds the parser's limits."""


@dataclass(slots=True, frozen=True)
class Expression:
    """Applies `operation` to `operands`: "number" has a value, "symbol" a name, "add" and "multiply" any operands."""

    operation: str
    operands: tuple[Expression, ...] = ()
    value: Fraction = Fraction(0)
    name: str = ""


@dataclass(slots=True, frozen=True)
class Token:
    kind: str
    text: str


def number(value: Fraction | int) -> Expression:
    return Expression("number", value=Fraction(value))


MINUS_ONE = number(-1)
DEGREE = Expression("multiply", (Expression("pi"), number(Fraction(1, 180))))


def negative(operand: Expression) -> Expression:
    if operand.operation == "number":
        return number(-operand.value)
    return Expression("multiply", (MINUS_ONE, operand))


def quotient(over: Expression, under: Expression) -> Expression:
    return Expression("multiply", (over, Expression("power", (under, MINUS_ONE))))


def product(factors: list[Expression]) -> Expression:
    return factors[0] if len(factors) == 1 else Expression("multiply", tuple(factors))


def difference(left: Expression, right: Expression) -> Expression:
    return Expression("add", (left, negative(right)))


@functools.lru_cache(maxsize=1024)
def parse_expression(text: str, sign: int = 1) -> Expression:
    r"""Returns the tree; \pm is read as `sign`, \mp as its opposite. Raises NotAnExpression."""
    parser = Parser(tokenize(text), sign)
    expression = parser.sum()
    if parser.position < len(parser.tokens):
        raise NotAnExpression(f"{parser.tokens[parser.position].text!r} is not expected")
    return expression


def tokenize(text: str) -> list[Token]:
    tokens: list[Token] = []
    end = 0
    while end < len(text):
        found = TOKEN.match(text, end)
        if found is None or len(tokens) == MAX_TOKENS:
            raise NotAnExpression(f"{text[end : end + 20]!r} is not read")
        end = found.end()
        kind = found.lastgroup
        assert kind is not None
        tokens.append(Token(kind, found[kind]))
    return tokens


def repeating_value(text: str) -> Fraction:
    r"""Returns the value of a repeating decimal: 0.1\overline{6} is 1/6."""
    found = REPEATING.fullmatch(text)
    assert found is not None
    period = re.sub(r"\D", "", found["rest"])
    whole, fixed = found["whole"] or "0", found["fixed"]
    head = Fraction(int(whole + fixed), 10 ** len(fixed))
    return head + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))


@dataclass(slots=True)
class Parser:
    """Parses by recursive descent; each method reads from `position` on."""

    tokens: list[Token]
    sign: int
    position: int = 0
    depth: int = 0
    num_bars: int = 0  # absolute-value bars that are open
    is_angle: bool = False  # True in the argument of a trigonometric function, where a degree is pi/180

    def peek(self, offset: int = 0) -> Token:
        index = self.position + offset
        return self.tokens[index] if index < len(self.tokens) else Token("end", "")

    def take(self) -> Token:
        token = self.peek()
        self.position += 1
        return token

    def accept(self, *texts: str) -> bool:
        if self.peek().text in texts and self.peek().kind != "end":
            self.position += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise NotAnExpression(f"{text!r} is missing before {self.peek().text!r}")

    def sum(self) -> Expression:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotAnExpression("nested too deeply")
        terms = [self.term(self.leading_sign())]
        while self.peek().text in ("+", "-", r"\pm", r"\mp"):
            terms.append(self.term(self.leading_sign()))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Expression("add", tuple(terms))

    def leading_sign(self) -> int:
        sign = 1
        while self.peek().text in ("+", "-", r"\pm", r"\mp"):
            mark = self.take().text
            sign *= {"+": 1, "-": -1, r"\pm": self.sign, r"\mp": -self.sign}[mark]
        return sign

    def term(self, sign: int) -> Expression:
        """Parses a term. Juxtaposition binds more tightly than multiplication and division signs: 1/2x is 1/(2x)."""
        factors = self.juxtaposed()
        while True:
            if self.accept(r"\cdot"):
                sign *= self.leading_sign()
                factors += self.juxtaposed()
            elif self.accept("/", r"\div"):
                sign *= self.leading_sign()
                factors.append(Expression("power", (product(self.juxtaposed()), MINUS_ONE)))
            else:
                break
        if sign < 0 and len(factors) == 1:
            return negative(factors[0])
        return product([MINUS_ONE, *factors] if sign < 0 else factors)

    def juxtaposed(self) -> list[Expression]:
        factors = [self.power()]
        while self.starts_factor():
            if self.peek().kind in ("number", "scientific", "repeating") and self.follows_number():
                raise NotAnExpression("two numbers side by side")
            factors.append(self.power())
        return factors

    def follows_number(self) -> bool:
        return self.position > 0 and self.tokens[self.position - 1].kind in ("number", "scientific", "repeating")

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("number", "scientific", "repeating", "letter", "text"):
            return True
        if token.kind == "command":
            name = token.text[1:]
            return name not in NO_SYMBOLS or name in STARTS_OF_FACTORS
        return token.text in ("(", "{", "[") or (token.text == "|" and self.num_bars == 0)

    def power(self) -> Expression:
        base = self.postfix()
        if not self.accept("^"):
            return base
        exponent = self.script()
        if self.peek().text == "^":
            raise NotAnExpression("two exponents")
        return self.marked(Expression("power", (base, exponent)))

    def script(self) -> Expression:
        r"""Parses the exponent after ^: a group, or one sign, digit run, letter or command."""
        if self.accept("{"):
            inner = self.sum()
            self.expect("}")
            return inner
        sign = self.leading_sign()
        operand = self.atom()
        return negative(operand) if sign < 0 else operand

    def postfix(self) -> Expression:
        return self.marked(self.atom())

    def marked(self, operand: Expression) -> Expression:
        """Applies the marks that may follow a value: factorial, percent, degrees."""
        while True:
            if self.accept("!"):
                operand = Expression("factorial", (operand,))
            elif self.accept(r"\%"):
                operand = Expression("multiply", (operand, number(Fraction(1, 100))))
            elif self.peek().text == "^" and self.peek(1).text == r"\circ":
                self.position += 2
                operand = Expression("multiply", (operand, DEGREE)) if self.is_angle else operand
            else:
                return operand

    def atom(self) -> Expression:
        token = self.take()
        if token.kind == "number":
            return self.mixed(Fraction(token.text.replace(",", "")))
        if token.kind == "scientific":
            mantissa, exponent = re.split("[eE]", token.text)
            return number(Fraction(mantissa) * Fraction(10) ** int(exponent))
        if token.kind == "repeating":
            return number(repeating_value(token.text))
        if token.kind == "letter":
            return self.letter(token.text)
        if token.kind == "text":
            return self.symbol(token.text[6:-1].strip())
        if token.kind == "command":
            return self.command(token.text[1:])
        closing = {"(": ")", "[": "]", "{": "}"}.get(token.text)
        if token.text == "{" and self.peek().text == "}":
            self.position += 1
            return self.combination_behind_superscript()
        if closing is not None:
            return self.group(closing)
        if token.text == "|":
            self.num_bars += 1
            inner = self.sum()
            self.num_bars -= 1
            self.expect("|")
            return Expression("abs", (inner,))
        raise NotAnExpression(f"{token.text!r} is not expected")

    def group(self, closing: str) -> Expression:
        bars, self.num_bars = self.num_bars, 0
        inner = self.sum()
        if closing == "}" and self.accept(r"\choose"):
            inner = Expression("binom", (inner, self.sum()))
        self.num_bars = bars
        self.expect(closing)
        return inner

    def mixed(self, value: Fraction) -> Expression:
        r"""Parses a mixed number, 2\frac{1}{2} as 2 + 1/2, or a number alone."""
        ahead = [self.peek(offset) for offset in range(7)]
        texts = [token.text for token in ahead]
        is_fraction = texts[:2] == [r"\frac", "{"] and texts[3:5] == ["}", "{"] and texts[6:] == ["}"]
        if value.denominator == 1 and is_fraction and texts[2].isdigit() and texts[5].isdigit() and int(texts[5]):
            self.position += 7
            return number(value + Fraction(int(texts[2]), int(texts[5])))
        return number(value)

    def letter(self, letter: str) -> Expression:
        if letter in "CPA" and self.peek().text in ("(", "_", "^") and (chosen := self.combination(letter)):
            return chosen
        return self.symbol(letter)

    def combination(self, letter: str) -> Expression | None:
        """Parses C(10,3), C_{10}^3 and C^3_{10}; returns None if the letter is a variable."""
        texts = [self.peek(offset).text for offset in range(12)]
        flat = "".join(texts)
        found = re.match(r"\((\d+),(\d+)\)", flat) if letter != "A" else None
        if found is None and (found := re.match(r"_\{?(\d+)\}?\^\{?(\d+)\}?", flat)):
            upper, lower = int(found[1]), int(found[2])
        elif found is None and (found := re.match(r"\^\{?(\d+)\}?_\{?(\d+)\}?", flat)):
            upper, lower = int(found[2]), int(found[1])
        elif found is not None:
            upper, lower = int(found[1]), int(found[2])
        if found is None:
            return None
        length = 0
        while length < found.end():
            length += len(self.take().text)
        return Expression("binom" if letter == "C" else "permutations", (number(upper), number(lower)))

    def combination_behind_superscript(self) -> Expression:
        """Parses {}^{10}C_3 and {}_{10}C_3, after the empty group."""
        self.take()
        upper = self.script()
        token = self.take()
        if token.text not in ("C", "P") or not self.accept("_"):
            raise NotAnExpression("an empty group")
        return Expression("binom" if token.text == "C" else "permutations", (upper, self.script()))

    def symbol(self, name: str) -> Expression:
        if name == "e":
            return Expression("e")
        if self.accept("_"):
            name = f"{name}_{self.raw_script()}"
        while self.accept("'"):
            name += "'"
        return Expression("symbol", name=name)

    def raw_script(self) -> str:
        if not self.accept("{"):
            return self.take().text
        texts = []
        while not self.accept("}"):
            if self.peek().kind == "end":
                raise NotAnExpression("an open group")
            texts.append(self.take().text)
        return "".join(texts)

    def command(self, name: str) -> Expression:
        if name == "frac":
            return quotient(self.argument(), self.argument())
        if name == "binom":
            return Expression("binom", (self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name in ("pi", "infty"):
            return Expression("pi" if name == "pi" else "infinity")
        if name in ("lfloor", "lceil"):
            inner = self.sum()
            self.expect(r"\rfloor" if name == "lfloor" else r"\rceil")
            return Expression("floor" if name == "lfloor" else "ceiling", (inner,))
        if name in FUNCTIONS:
            return self.function(name)
        if name in LIST_FUNCTIONS:
            return self.list_function(name)
        if name in ("overline", "bar") and self.holds_sum():
            return Expression("conj", (self.argument(),))
        if name in DECORATIONS:
            return Expression("symbol", name=f"{name} {self.raw_argument()}")
        if name in NO_SYMBOLS or len(name) == 1:
            raise NotAnExpression(rf"\{name} is not expected")
        return self.symbol(rf"\{name}")

    def holds_sum(self) -> bool:
        """Returns whether the next group is a sum, such as under the bar of a complex conjugate."""
        offset = 1
        while self.peek(offset).text not in ("}", "{", ""):
            if self.peek(offset).text in ("+", "-"):
                return self.peek().text == "{"
            offset += 1
        return False

    def argument(self) -> Expression:
        if self.accept("{"):
            return self.group("}")
        token = self.peek()
        if token.kind == "number" and len(token.text) > 1:
            raise NotAnExpression("a number without braces")
        return self.atom()

    def raw_argument(self) -> str:
        if self.peek().text == "{":
            return self.raw_script()
        return self.take().text

    def root(self) -> Expression:
        index = number(2)
        if self.accept("["):
            index = self.group("]")
        return Expression("root", (self.argument(), index))

    def function(self, name: str) -> Expression:
        """Parses a function: sin x, sin^2 x, sin^{-1} x, log_2 x, log_{2}(x)."""
        base = power = None
        for _ in range(2):
            if name in ("log",) and base is None and self.accept("_"):
                base = self.script()
            elif self.peek().text == "^" and power is None:
                self.position += 1
                power = self.script()
        if power == MINUS_ONE and name in INVERSES:
            name, power = INVERSES[name], None
        was_angle, self.is_angle = self.is_angle, self.is_angle or name in TRIGONOMETRIC
        argument = self.function_argument()
        self.is_angle = was_angle
        result = Expression(name, (argument,))
        if base is not None:
            result = quotient(Expression("ln", (argument,)), Expression("ln", (base,)))
        return Expression("power", (result, power)) if power is not None else result

    def function_argument(self) -> Expression:
        if self.peek().text in ("(", "{", "["):
            argument = self.postfix()
            return argument if self.peek().text != "^" or self.peek(1).text != r"\circ" else self.marked(argument)
        sign = self.leading_sign()
        factors = [self.power()]
        while self.continues_argument():
            if self.accept("/"):
                factors.append(Expression("power", (self.power(), MINUS_ONE)))
            else:
                factors.append(self.power())
        return product([MINUS_ONE, *factors] if sign < 0 else factors)

    def continues_argument(self) -> bool:
        token = self.peek()
        if token.text == "/":
            return self.peek(1).kind in ("number", "letter")
        if token.kind == "command":
            name = token.text[1:]
            return self.starts_factor() and name not in FUNCTIONS | LIST_FUNCTIONS
        return token.kind in ("number", "letter") and not self.follows_number_pair()

    def follows_number_pair(self) -> bool:
        return self.peek().kind == "number" and self.follows_number()

    def list_function(self, name: str) -> Expression:
        closing = {"(": ")", "{": "}", r"\{": r"\}", "[": "]"}.get(self.take().text)
        if closing is None:
            raise NotAnExpression(rf"\{name} without a list")
        operands = [self.sum()]
        while self.accept(","):
            operands.append(self.sum())
        self.expect(closing)
        return Expression(name, tuple(operands))
