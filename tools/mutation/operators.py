"""The changes: each is one that a slip of the pen could have made, and changes one expression or one statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.BitOr: ("|", "&"), ast.BitAnd: ("&", "|"),
}  # fmt: skip
SWAPPED = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "amin": "amax",
    "amax": "amin",
    "clamp_min": "clamp_max",
}
# What says nothing about behaviour: types, messages, how dataclasses are made.
Skipped = (ast.AnnAssign, ast.arguments, ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert)
Span = tuple[ast.AST, str]


@dataclass(frozen=True, slots=True)
class Mutant:
    file: str
    line: int
    last_line: int  # of the statement that is changed
    change: str  # e.g. "a < b -> a <= b"
    source: str  # of the changed file

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}: {self.change}"


class Source:
    """A file's text, addressed as the syntax tree does: lines from 1 on, columns in UTF-8 bytes."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def begin(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def of(self, node: ast.AST) -> str:
        return self.text[self.begin(node) : self.end(node)].decode()

    def replaced(self, begin: int, end: int, text: str) -> str:
        return (self.text[:begin] + text.encode() + self.text[end:]).decode()


def mutants_of(file: str, text: str) -> list[Mutant]:
    """All mutants of a file, in the order of their lines; those that are no Python are left out."""
    source = Source(text)
    found: dict[str, Mutant] = {}
    for statement in statements(ast.parse(text)):
        last_line = last_line_of(statement)
        for begin, end, new, node in changes(statement, source):
            changed = source.replaced(begin, end, new)
            try:
                ast.parse(changed)
            except SyntaxError:
                continue
            before = " ".join(source.of(node).split())
            shift = len(new.encode()) - (end - begin)
            after = " ".join(changed.encode()[source.begin(node) : source.end(node) + shift].decode().split())
            mutant = Mutant(file, node.lineno, last_line, f"{before[:100]} -> {after[:100]}", changed)  # type: ignore[attr-defined]
            found.setdefault(mutant.key, mutant)
    return list(found.values())


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Every statement; of a compound one, only its head is looked at."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not is_docstring(node) and not is_for_types(node):
            yield node


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def last_line_of(statement: ast.stmt) -> int:
    body = getattr(statement, "body", None)
    if body:
        return max(statement.lineno, body[0].lineno - 1)
    return statement.end_lineno or statement.lineno


def changes(statement: ast.stmt, source: Source) -> Iterator[tuple[int, int, str, ast.AST]]:
    """(begin, end, new text, what is shown as changed)."""
    match statement:
        case ast.Return(value=value) if value is not None and not is_none(value):
            yield source.begin(value), source.end(value), "None", statement
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign() | ast.Delete():
            yield source.begin(statement), source.end(statement), "pass", statement
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield source.begin(statement), source.end(statement), "pass", statement
        case ast.Break() | ast.Continue():
            yield source.begin(statement), source.end(statement), "pass", statement
        case ast.If(test=test) | ast.While(test=test) if not isinstance(test, (ast.Compare, ast.UnaryOp)):
            yield source.begin(test), source.end(test), f"not ({source.of(test)})", test
    for node in expressions(statement):
        yield from changes_of(node, source)


def expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    waiting: list[ast.AST] = [
        child for child in ast.iter_child_nodes(statement) if not isinstance(child, (ast.stmt, *Skipped))
    ]
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, *Skipped)):
        waiting = [statement.value] if isinstance(statement, ast.AnnAssign) and statement.value is not None else []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.expr):
            yield node
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, (ast.stmt, ast.JoinedStr))]


def changes_of(node: ast.expr, source: Source) -> Iterator[tuple[int, int, str, ast.AST]]:
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in COMPARISONS:
            yield from between(left, right, COMPARISONS[type(operator)], node, source)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in ARITHMETIC:
            if not any(is_text(side) for side in (left, right)):  # of texts and paths, anything else is an error
                yield from between(left, right, ARITHMETIC[type(operator)], node, source)
        case ast.BoolOp(op=operator, values=values):
            words = ("and", "or") if isinstance(operator, ast.And) else ("or", "and")
            yield from between(values[0], values[1], words, node, source)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield source.begin(node), source.begin(operand), "", node
        case ast.Constant(value=bool() as value):
            yield source.begin(node), source.end(node), str(not value), node
        case ast.Constant(value=int() | float() as number):
            new = number + 1 if isinstance(number, int) else number * 2 or 1.0
            yield source.begin(node), source.end(node), repr(new), node
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in SWAPPED:
            end = source.end(node.func)
            yield end - len(name.encode()), end, SWAPPED[name], node
        case ast.IfExp(test=test) if not isinstance(test, (ast.Compare, ast.UnaryOp)):
            yield source.begin(test), source.end(test), f"not ({source.of(test)})", node


def between(
    left: ast.expr, right: ast.expr, words: tuple[str, str], node: ast.expr, source: Source
) -> Iterator[tuple[int, int, str, ast.AST]]:
    """Changes the operator between two operands; brackets around them stay."""
    begin, end = source.end(left), source.begin(right)
    gap = source.text[begin:end].decode()
    if words[0] in gap:
        yield begin, end, gap.replace(words[0], words[1], 1), node


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
