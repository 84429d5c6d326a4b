"""Lists the words and commands that distinguish mathematics from language."""

from __future__ import annotations


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Function names in plain text; LaTeX writes them with a backslash.
PLAIN_FUNCTIONS = word_set(
    """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth asin acos atan exp ln log lg sqrt abs max min
    gcd lcm det"""
)
FUNCTIONS = word_set(
    """abs sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh coth exp ln log lg det arg Re Im deg
    sgn"""
)
TRIGONOMETRIC = word_set("sin cos tan cot sec csc")
LIST_FUNCTIONS = word_set("max min gcd lcm")
# Commands that form one name together with their argument.
DECORATIONS = word_set(
    """hat bar vec tilde dot ddot overline overrightarrow widehat widetilde overleftrightarrow mathbb"""
)
# Commands that are not variables.
NO_SYMBOLS = word_set(
    """frac sqrt binom cdot div pm mp leq geq neq in notin cup cap setminus subset subseteq supset to ldots cdots dots
    approx equiv mod sum prod int lim begin end land lor text emptyset rightarrow Rightarrow implies iff forall exists
    choose over atop root mathbb circ perp parallel sim cong propto infty pi nabla partial prime left right angle
    triangle not rfloor rceil lfloor lceil rangle langle iint iiint oint limsup liminf bigcup bigcap coprod"""
)
STARTS_OF_FACTORS = word_set("frac sqrt binom infty pi lfloor lceil")

JOINING_WORDS = word_set("and or to if for when where otherwise is not either both with but per")
SHORT_WORDS = JOINING_WORDS | word_set("am pm no of in at by be we it as so the all")

# Words that change or retract the value before them, so they are not nouns for counted things.
NOT_NOUNS = word_set(
    """and or if only mod not no more less fewer than is are was maybe perhaps probably possibly unless except but
    either neither nor both least most below above under over negative minus plus positive factorial squared
    cubed square cube cubic root roots wrong incorrect false invalid impossible undefined unknown none never
    else otherwise approximately about to from through until between without with twice double triple pair pairs
    couple score gross mille percent pct percentage ago before after early late short away off deficit debt half
    per base modulo where when for while the a an any all some every then also too error errors guess infinity
    first last next correct right true yes ish one ones twos googol zillion kilo mega reciprocal inverse
    opposite excluding including inclusive exclusive nope wait actually hmm hopefully likely unlikely surely
    certainly beyond past till roughly instead sorry oops two three four five six seven eight nine ten eleven
    twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
    eighty ninety zero zeros remainder imaginary"""
)
# Characters of Chinese and Japanese words that change the value before them: or, more, not, about, ten thousand.
NOT_IN_UNITS = frozenset("以或不非无錯错约約和与及半倍万萬亿億千百十多少余几超未")
ADJECTIVES = word_set("different distinct possible unique total whole full such")
IGNORED_WORDS = word_set("old of long wide tall high deep each in")
LEADING_WORDS = word_set("approximately about around roughly approx nearly exactly")
