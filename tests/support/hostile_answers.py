"""Answers made to burn time or memory, to run code, or to break a parser: what a policy or a data set may hold."""

from __future__ import annotations


def matrix_of_sums(exponent: str) -> str:
    rows = (" & ".join(f"x+{row}{column}y" for column in range(3)) for row in range(3))
    return r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}" + exponent


# Symbolic powers that only math-verify reads, for some twenty seconds; either alone is read at once.
ENDLESS, ENDLESS_ANSWER = matrix_of_sums("^{99}"), matrix_of_sums("^{98}")
# What our parser refuses and math-verify's takes seconds to read.
SLOW_REFERENCE = "x_" * 480 + "x"

MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
HOSTILE_ANSWERS = [
    # Code.
    "__import__('os').mkdir('ran')", "open('ran','w')", "open(ran, w)", "eval(1)", "exec('1')", "import os", "`touch ran`",
    "lambda: 1", "().__class__", "getattr(1,'real')", "os.system('touch ran')", "globals()", "compile('1','','eval')",
    # Powers.
    "9^9^9^9", "9^{9^{9^9}}", "10^{10^{10}}", "10^{10^10}", "2^{100000}", "x^{99999999999999999999}", "10**10**10",
    "(((10^{99})^{99})^{99})^{99}", r"2^{100 \cdot 1000}", "2^{(100)(1000)}", "2^{20!}", "(x+1)^{9999}", "(x+y+z+w)^{999}",
    "9" * 490 + "^{9999}", "(((((x+1)^9)^9)^9)^9)", "x^{x^x}", "^{2}".join(["x"] * 200), "(1+i)^{9999}", r"\pi^{9999}+" * 40 + "1",
    "1e999999999", "1e9999", "10⁹⁹⁹⁹⁹⁹",
    # Factorials, binomials, sums.
    "100000!", "(10^5)!", "((5!)!)!", "9!!", "9999!", "999!" * 100, r"\binom{100000}{50000}", r"{100000 \choose 5}",
    r"\binom{1000}{500}" * 40, r"\binom{x}{y}" * 60, r"\sum_{k=1}^{10^9} k", r"\prod_{k=1}^{99} k", r"\int_0^1 x^x dx",
    r"\lim_{x \to 0} x", "C(9999,5000)", "C(99999999,50)", "P(999999,9999)", r"\gcd(10^{9999}+1,10^{9998})",
    # Functions.
    r"\sin(" * 40 + "x" + ")" * 40, r"\exp(" * 40 + "5" + ")" * 40, r"\sinh(" * 45 + "5" + ")" * 45,
    r"\arctan(" * 20 + "x" + ")" * 20, r"\tan x" * 120, r"\sin(10^{9999})", r"\cos(2^{-9999})" + r"+\cos(2^{-9998})" * 30,
    r"\ln(\ln(x^{x^x}))", r"\sqrt{" * 45 + "2" + "}" * 45, r"\sqrt[1000000]{2}", r"\sqrt[9999]{x}" * 50,
    "+".join(rf"\sqrt{{x+{index}}}" for index in range(80)), r"\lfloor x" * 40 + r"\rfloor" * 40,
    # Long and nested.
    "(" * 49 + "x" + ")" * 49, "(" * 500 + "5" + ")" * 500, "|" * 300 + "x" + "|" * 300, "|x" * 150 + "|" * 150,
    r"\frac{1}{" * 45 + "x" + "}" * 45, "-" * 900 + "x", "x" * 900, "x_" * 400 + "x", "1/" * 400 + "x", "x+" * 499 + "x",
    "1" * 1000, "1" * 2000, "1," * 490 + "2", "x," * 490 + "2", "(1,2)," * 150 + "(3,4)", "x=1," * 200 + "x=2",
    "a<" * 300 + "b", "a=" * 300 + "b", "1:" * 400 + "2", r"\pm x" * 150, r"\text{a}" * 120, r"\text{cm}" * 120,
    "5" + r"\text{ cm}/" * 80, "~" * 1000, "{" * 400, "^" * 500, r"\frac" * 190, "$" * 999, "0.\\overline{" + "1" * 900 + "}",
    # Sets, matrices, tables.
    r"\cup".join(f"({index},{index + 1})" for index in range(60)), r"\cup".join(f"({index}x,{index + 1}x)" for index in range(60)),
    ",".join(f"x^{{{index}}}" for index in range(100)), r"\mathbb{R}\setminus\{" + ",".join(map(str, range(200))) + r"\}",
    MATRIX + "^{100000}", MATRIX + "^{99}", ENDLESS, r"\begin{cases}" + r"x&x>0\\" * 80 + r"\end{cases}",
    r"\begin{pmatrix}" + r"\sin x\\" * 60 + r"\end{pmatrix}", "x^{100}+" * 50 + "1=0",
    # Characters.
    "5\x00", "5\u202e", "5\ud800", "5\u200b", "\u0661\u0662", "中" * 300, "²" * 300,
]  # fmt: skip
