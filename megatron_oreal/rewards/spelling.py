r"""Normalises the spelling of a LaTeX answer without changing its meaning: Unicode, layout, fonts, fractions and roots.

The result holds words as `\text{lower or upper case words}`, with no digit or punctuation inside, and mathematics
outside. Every pattern takes time linear in the text: no repetition can match what follows it in the pattern.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from megatron_oreal.rewards.plain_text import mark_plain_text

CACHE_SIZE = 4096  # entries; a normalised answer has a few thousand characters at most

SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
# These are replaced before the compatibility normalisation, which would lose their meaning.
SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\cdot ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ", "∕": "/", "∞": r"\infty ", "≤": r"\leq ", "⩽": r"\leq ", "≦": r"\leq ", "≥": r"\geq ",
    "⩾": r"\geq ", "≧": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "≡": r"\equiv ", "±": r"\pm ", "∓": r"\mp ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∨": r"\lor ", "∧": r"\land ", "∖": r"\setminus ",
    "∠": r"\angle ", "△": r"\triangle ", "∆": r"\triangle ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}", "√": r"\root ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]",
    "∣": "|", "、": ",", "。": ".", "∶": ":", "⟨": r"\langle ", "⟩": r"\rangle ", "°": r"^\circ ", "º": r"^\circ ",
    "℃": r"^\circ \text{C}", "℉": r"^\circ \text{F}", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
    "⌉": r"\rceil ", "…": r"\ldots ", "“": '"', "”": '"', "’": "'", "‘": "'", "′": "'", "″": "''", "\u00b5": r"\mu ",
    "→": r"\to ", "⊥": r"\perp ", "∥": r"\parallel ", "‰": r"\text{per mille}", "ℓ": r"\ell ",
}  # fmt: skip
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma sigma tau upsilon "
    "phi chi psi omega"
)
GREEK_LETTERS = {chr(0x3B1 + index): rf"\{name} " for index, name in enumerate(GREEK.split())}
CAPITAL_GREEK = {"Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma",
                 "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega"}  # fmt: skip
CHARACTERS = SYMBOLS | GREEK_LETTERS | {letter: rf"\{name} " for letter, name in CAPITAL_GREEK.items()}
SCRIPT_RUN = re.compile(f"(?P<up>[{''.join(SUPERSCRIPTS)}]+)|(?P<down>[{''.join(SUBSCRIPTS)}]+)")


def plain_characters(text: str) -> str:
    """Replaces Unicode characters by LaTeX and ASCII of the same meaning; letters of other alphabets stay."""
    if text.isascii():
        return text
    text = SCRIPT_RUN.sub(script_text, text)
    text = "".join(map(character_text, text))
    # Compatibility characters first become ordinary characters, some of which the table replaces.
    return "".join(CHARACTERS.get(character, character) for character in unicodedata.normalize("NFKC", text))


def script_text(run: re.Match[str]) -> str:
    table, mark = (SUPERSCRIPTS, "^") if run["up"] else (SUBSCRIPTS, "_")
    return f"{mark}{{{''.join(table[character] for character in run[0])}}}"


def character_text(character: str) -> str:
    if character in CHARACTERS:
        return CHARACTERS[character]
    decomposition = unicodedata.decomposition(character)
    if decomposition.startswith("<fraction>"):
        over, _, under = unicodedata.normalize("NFKC", character).partition("\u2044")
        return rf"\frac{{{over}}}{{{under}}}" if under else character
    return character


END = r"(?![a-zA-Z])"  # end of a command's name


def rules(*pairs: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# Patterns for markup that only affects the layout, applied in this order.
LAYOUT = rules(
    (r"(?:\s|~)+", " "),
    (r"(?<!\\)\\\\(?=[a-zA-Z]{2,}\s?\{)", r"\\"),  # doubled backslashes of an escaped string
    (r"\\(?:boxed|fbox|underline|uline|ensuremath|mathop|emph)(?![a-zA-Z]) ?(?=\{)", ""),
    (r"\\(?:text)?color ?\{[^{}]*\}|\\colorbox ?\{[^{}]*\}|\\[hv]?phantom ?\{[^{}]*\}|\\hspace\*? ?\{[^{}]*\}", ""),
    (r"\\text ?\{ ?([€£¥₹₩₽¢]|\\\$) ?\}", r"\1"),
    (rf"\\\$|\\(?:textdollar){END}", r" \\text{dollars} "),
    (rf"€|\\(?:euro|texteuro){END}", r" \\text{euros} "),
    (rf"£|\\(?:pounds|textsterling){END}", r" \\text{pounds sterling} "),
    (rf"[¥￥]|\\(?:yen|textyen){END}", r" \\text{yen} "),
    (r"₹", r" \\text{rupees} "),
    (r"₩", r" \\text{won} "),
    (r"₽", r" \\text{rubles} "),
    (rf"¢|\\(?:textcent){END}", r" \\text{cents} "),
    (r"\$|(?<!\\)\\[()\[\]]", ""),
    (rf"(?<!\\)\\! ?|\\(?:left|right|displaystyle|textstyle|limits|nolimits|middle|[bB]igg?[lrm]?){END}\.? ?", ""),
    (r"\{ ?([,:=]) ?\}", r"\1"),
    (r"(?<=\d)\\[, ](?=\d{3}(?!\d))", ""),  # 10\,080
    (rf"(?<!\\)\\[,;:> ]|\\(?:q?quad|enspace|thinspace|thickspace|medspace|nobreakspace|hfill){END}", " "),
    (rf"\\[dtc]frac{END}", r"\\frac"),
    (rf"\\[dt]binom{END}", r"\\binom"),
    (r"\\(?:text(?:bf|it|rm|sf|tt|sc|sl|up|md|normal)?|mbox|hbox|mathrm|mathsf|mathtt|textcircled) ?\{", r"\\text{"),
    (r"\{ ?\\rm ([^{}\\]*)\}", r"\\text{\1}"),
    (rf"\\(?:mathbf|mathit|mathcal|mathscr|mathfrak|boldsymbol|bm|pmb|bold){END} ?", ""),  # never units
    (rf"\\(?:rm|bf|it|tt|sf|large|Large|small|normalsize){END} ?", ""),
    (r": ?=", "="),
    (rf"\\(?:le|leqslant|leqq){END}|<=", r"\\leq "),
    (rf"\\(?:ge|geqslant|geqq){END}|>=", r"\\geq "),
    (rf"\\ne{END}|!=|\\not ?=", r"\\neq "),
    (rf"\\lt{END}", "<"),
    (rf"\\gt{END}", ">"),
    (rf"\\lbrace{END}", r"\\{"),
    (rf"\\rbrace{END}", r"\\}"),
    (rf"\\lbrack{END}", "["),
    (rf"\\rbrack{END}", "]"),
    (rf"\\[lr]?vert{END}|\\mid{END}", "|"),
    (rf"\\vee{END}", r"\\lor "),
    (rf"\\wedge{END}", r"\\land "),
    (rf"\\varepsilon{END}", r"\\epsilon "),
    (rf"\\varphi{END}", r"\\phi "),
    (rf"\\vartheta{END}", r"\\theta "),
    (rf"\\varnothing{END}", r"\\emptyset "),
    (rf"\\infin{END}", r"\\infty "),
    (rf"\\(?:dots|cdots|dotsc|dotsb){END}", r"\\ldots "),
    (rf"\\langle{END}", "("),
    (rf"\\rangle{END}", ")"),
    (rf"\\imath{END}", "i"),
    (rf"\\colon{END}", ":"),
    (rf"\\(?:cdot|times|ast){END}|\*(?!\*)(?<!\*\*)", r"\\cdot "),
    (r"\*\*", "^"),
    (r"\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})|\\(?:degree|textdegree)(?![a-zA-Z])|(?<!\^)\\circ(?![a-zA-Z])(?= ?$)",
     r"^\\circ "),
    (rf"\\root ?(\d+(?:\.\d+)?|[a-zA-Z]{END})", r"\\sqrt{\1}"),  # the sign: of a whole number
    (rf"\\root{END}", r"\\sqrt"),
    (r"\( ?\\text\{ ?mod ?\} ?([^()]*)\)|\\pmod ?\{([^{}]*)\}|\\pmod ?(\w)|\( ?mod ([^()]*)\)", r" \\mod \1\2\3\4"),
    (rf"\\bmod{END}|\\text\{{ ?mod(?:ulo)? ?\}}|(?<![a-zA-Z\\])mod{END}", r" \\mod "),
)  # fmt: skip
# Patterns that are applied after the words are marked.
MATHEMATICS = rules(
    (r" +", " "),
    (r" ?(?:\\?%|\\text\{(?:percent|per cent|pct|percentage)\})", r"\\%"),
    (r"\\text\{(sin|cos|tan|cot|ln|log|exp|max|min|gcd|lcm|Re|Im|arg|det)\}(?= ?[({\\])", r"\\\1 "),
    (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac ?(\d) ?(?=\{)", r"\\frac{\1}"),
    (r"\\frac ?(\{[^{}]*\}) ?(\d)", r"\\frac\1{\2}"),
    (rf"\\sqrt ?(\d|[a-zA-Z]{END})", r"\\sqrt{\1}"),
    (r"([_^]) ?\{ ?(\w) ?\}", r"\1\2"),
    (r"(?<=[\])]) ?(?:\\text\{[uU]\}|(?<= )U(?= )) ?(?=[\[(])", r"\\cup "),
    (r"(?<=\d) ?\^ ?\\text\{ ?(?:st|nd|rd|th) ?\}|(?<=\d)\^\{\\text\{(?:st|nd|rd|th)\}\}", ""),  # 3^{rd}
    (r"(?<=\d)(?:\\text\{(?:st|nd|rd|th)\}|(?:st|nd|rd|th)(?![a-zA-Z]))", ""),
    (r"^\\text\{(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is)?\} ?: ?", ""),
    (r"(\\text\{[a-zA-Z]{2,9}\}) ?/ ?([a-zA-Z])(?![a-zA-Z({])", r"\1/\\text{\2}"),  # km/h
    (r"\{ ?([\w+-]{1,40}) ?\\choose ?([\w+-]{1,40}) ?\}", r"\\binom{\1}{\2}"),
    (r" ?\( ?([a-zA-Z]) ?\\in ?(\\mathbb ?\{[ZNQ]\}) ?\)$", r", \1 \\in \2"),
    (r",? ?\\text\{(?:where|for|with|for any|for all|for some)\} ?(?=[a-zA-Z] ?\\in)", ", "),
    (r" +", " "),
)
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
ABBREVIATION = re.compile(r"(?<![^\W\d_])([^\W\d_])\. ?([^\W\d_])\.")  # a.m.
WORDS = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*\.?(?: +[^\W\d_]+(?:['-][^\W\d_]+)*\.?)*")
ADJACENT_TEXTS = re.compile(r"\\text\{([^{}]*)\} ?\\text\{([^{}]*)\}")
SPACED_THOUSANDS = re.compile(r"-?\d{1,3}(?: \d{3})+")
OPERATOR_NAME = re.compile(r"\\operatorname\*? ?\{ ?([a-zA-Z]+) ?\}")
MEANING_OF_TEXT = {
    "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}", "all real": r"\mathbb{R}",
    "the set of all real numbers": r"\mathbb{R}", "real numbers": r"\mathbb{R}", "reals": r"\mathbb{R}",
    "no solution": r"\emptyset", "no solutions": r"\emptyset", "empty set": r"\emptyset",
    "the empty set": r"\emptyset", "no real solution": r"\emptyset", "no real solutions": r"\emptyset",
    "infinity": r"\infty", "negative infinity": r"-\infty", "minus infinity": r"-\infty",
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14",
    "fifteen": "15", "sixteen": "16", "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20",
    "a half": r"\frac{1}{2}", "a third": r"\frac{1}{3}", "a quarter": r"\frac{1}{4}",
    "one half": r"\frac{1}{2}", "one-half": r"\frac{1}{2}", "half": r"\frac{1}{2}", "one third": r"\frac{1}{3}",
    "one-third": r"\frac{1}{3}", "two thirds": r"\frac{2}{3}", "two-thirds": r"\frac{2}{3}",
    "one quarter": r"\frac{1}{4}", "one-quarter": r"\frac{1}{4}", "three quarters": r"\frac{3}{4}",
    "three-quarters": r"\frac{3}{4}", "one fourth": r"\frac{1}{4}", "three fourths": r"\frac{3}{4}",
}  # fmt: skip


@functools.lru_cache(maxsize=CACHE_SIZE)  # the samples of a group often repeat an answer
def normalize(text: str) -> str:
    """Rewrites a LaTeX answer to one spelling; spaces still distinguish 1,234 from the list 1, 234."""
    text = apply(LAYOUT, plain_characters(text))
    text = OPERATOR_NAME.sub(r" \1 ", text)
    text = TEXT.sub(lambda found: separate_words(found[1]), text)
    text = mark_plain_text(text.strip().rstrip(".;,").strip())
    text = apply(MATHEMATICS, merge_texts(text)).strip().rstrip(".;,\\ ")
    if SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    while (inner := remove_outer_braces(text)) != text:
        text = inner
    text = text.removeprefix("=").lstrip().removeprefix("+").lstrip()
    return meaning_of(text)


def meaning_of(text: str) -> str:
    r"""Replaces phrases by symbols: `\text{all real numbers}` becomes `\mathbb{R}`."""
    whole = TEXT.fullmatch(text)
    return MEANING_OF_TEXT.get(whole[1].strip().lower(), text) if whole else text


def apply(patterns: tuple[tuple[re.Pattern[str], str], ...], text: str) -> str:
    for pattern, replacement in patterns:
        text = pattern.sub(replacement, text)
    return text


def separate_words(content: str) -> str:
    r"""Splits the content of \text: ` or 8` becomes ` \text{or} 8`, and `(C)` becomes `(\text{C})`."""
    content = ABBREVIATION.sub(r"\1\2", content)
    return WORDS.sub(marked_words, content) if not content.startswith("\\") else content


def marked_words(found: re.Match[str]) -> str:
    words = found[0].split(" ")
    # The dot of "sq. ft." has no meaning; the dot after an option's label has one.
    last = words[-1]
    dot = "." if last.endswith(".") and len(last) == 2 else ""
    return rf"\text{{{' '.join(word.rstrip('.') for word in words if word)}}}{dot}"


def merge_texts(text: str) -> str:
    while (merged := ADJACENT_TEXTS.sub(r"\\text{\1 \2}", text)) != text:
        text = merged
    return text


def remove_outer_braces(text: str) -> str:
    """Returns `x` for `{x}`; does not change `{a}{b}`."""
    if not (text.startswith("{") and text.endswith("}")):
        return text
    depth = 0
    for index, character in enumerate(text):
        escaped = index > 0 and text[index - 1] == "\\"
        depth += 0 if escaped else (character == "{") - (character == "}")
        if depth == 0:
            return text[1:-1].strip() if index == len(text) - 1 else text
    return text


LOOSE_SPACE = re.compile(r"(?<=[^\w\\]) |(?<=\\\\) | (?=\W)")
LOOSE_BRACES = re.compile(r"(?<![\\}\w\]])\{(\w)\}")


def without_spaces(normalized: str) -> str:
    """Removes spaces, except those between two word characters, to compare spellings."""
    return LOOSE_SPACE.sub("", normalized)
