"""Small faults: each changes one node of a module's syntax tree, as a slip of the hand would."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.MatMult: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
_COMPARISONS = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_TWO = 2


@dataclass(frozen=True, slots=True)
class Mutant:
    """A module with one fault.

    Attributes:
        line: where.
        what: the change.
        source: the whole module.
    """

    line: int
    what: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every mutant of a module, in order of lines; annotations, docstrings and raises are left alone."""
    tree = ast.parse(source)
    todo = [(n, change) for n in _mutable(tree) for change in _changes(n)]
    for node, change in sorted(todo, key=lambda item: getattr(item[0], "lineno", 0)):
        index = list(ast.walk(tree)).index(node)
        twin = copy.deepcopy(tree)
        place = list(ast.walk(twin))[index]
        before = ast.unparse(place)
        change(place)
        ast.fix_missing_locations(twin)
        after = ast.unparse(place)
        if after != before:
            lines = zip(before.splitlines(), after.splitlines(), strict=False)
            old, new = next((a, b) for a, b in lines if a != b)
            what = f"{_short(old)} -> {_short(new)}"
            yield Mutant(getattr(node, "lineno", 0), what, ast.unparse(twin))


def _short(text: str) -> str:
    return " ".join(text.split())[:60]


def _mutable(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that decide what a program computes."""
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list", "type_params"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _says_only(child):
                continue
            if isinstance(node, ast.Module) and not _computes(child):
                continue
            yield child
            yield from _mutable(child)


def _says_only(node: ast.AST) -> bool:
    """True for docstrings, error messages and imports."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr)


def _computes(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign)


def _changes(node: ast.AST) -> Iterator[Callable[[Any], None]]:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield lambda n: setattr(n, "op", _ARITHMETIC[type(n.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        yield lambda n: n.ops.__setitem__(0, _COMPARISONS[type(n.ops[0])]())
    elif isinstance(node, ast.BoolOp):
        yield lambda n: setattr(n, "op", ast.And() if isinstance(n.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield lambda n: setattr(n, "op", ast.UAdd() if isinstance(n.op, ast.USub) else _not_not(n))
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Call) and len(node.args) >= _TWO and not _stars(node):
        yield lambda n: n.args.__setitem__(slice(0, 2), n.args[1::-1])
    elif isinstance(node, ast.If):
        yield lambda n: setattr(n, "test", ast.Constant(value=False))
        yield lambda n: setattr(n, "test", ast.Constant(value=True))
    elif isinstance(node, ast.FunctionDef | ast.If | ast.For | ast.With):
        pass
    if hasattr(node, "body") and isinstance(node.body, list):
        yield from (_without(i) for i, s in enumerate(node.body) if _may_go(s))


def _constants(node: ast.Constant) -> Iterator[Callable[[Any], None]]:
    if isinstance(node.value, bool):
        yield lambda n: setattr(n, "value", not n.value)
    elif isinstance(node.value, int | float):
        yield lambda n: setattr(n, "value", n.value + 1)


def _not_not(node: Any) -> ast.AST:
    node.operand = ast.UnaryOp(op=ast.Not(), operand=node.operand)
    return ast.Not()


def _stars(node: ast.Call) -> bool:
    return any(isinstance(arg, ast.Starred) for arg in node.args)


def _may_go(statement: ast.stmt) -> bool:
    """True for statements without which a program may still run: calls and updates."""
    call = isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
    return call or isinstance(statement, ast.AugAssign)


def _without(index: int) -> Callable[[Any], None]:
    return lambda node: node.body.__setitem__(index, ast.Pass())
