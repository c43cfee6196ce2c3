"""Strings of a program's file that torch makes code of: sizes, guards and trees of arguments.

torch evaluates the first as sympy expressions, runs the second as Python, and imports what the third
names. Each is taken apart here and only what programs need of it is let through.
"""

import ast
import json
import keyword
import re
from typing import Any

from vera_fx.errors import shown

_LONGEST = 20_000
_DEEPEST = 64
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,9}")
_IN_SIZES = re.compile(r"[a-z]{1,8}\d{1,9}|[-+]?[\d.]{1,40}(e[-+]?\d{1,3})?")
_PLAIN = re.compile(r"[^\x00-\x1f\x7f\"'\\\u2028\u2029]*")
_TREES = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}

# What sympy and torch call the parts of a size.
_FUNCTION = re.compile(
    "Abs|Add|And|CeilDiv|CeilToInt|CleanDiv|Eq|Equality|ExprCondPair|Float|FloatPow|FloatTrueDiv|"
    "FloorDiv|FloorToInt|Ge|GreaterThan|Gt|Identity|IntTrueDiv|Integer|Le|LessThan|LShift|Lt|Max|Min|Mod|"
    "IsNonOverlappingAndDenseIndicator|ModularIndexing|Mul|Ne|Not|Or|Piecewise|Pow|PowByNatural|PythonMod|"
    "Rational|RoundDecimal|RoundToInt|RShift|StrictGreaterThan|StrictLessThan|Symbol|ToFloat|Tuple|"
    "TruncToFloat|TruncToInt|Unequality|Where|Xor|ceiling|floor|"
    "OpaqueUnaryFn_(sqrt|cos|sin|tan|exp|log|log2|tanh)"
)
_CONSTANT = re.compile("oo|int_oo|nan|inf|true|false|zoo")
_POWER = re.compile("Pow|PowByNatural|FloatPow|LShift|RShift")
_LARGEST_POWER = 64

_GUARD = re.compile("Abs|Max|Min|Mod|PythonMod|FloorDiv|abs|max|min|float|int|bool")
_METHOD = re.compile("size|stride|storage_offset|dim")
_MATH = re.compile("sqrt|floor|ceil|trunc|log2|log|exp|pow|inf")

_OPERATIONS = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
)


def check_name(text: Any, *, argument: bool = False) -> None:
    """Refuse what is no identifier: torch writes names into the source of graphs.

    Raises:
        ValueError: with the text.
    """
    if (
        not isinstance(text, str)
        or not text.isidentifier()
        or (argument and keyword.iskeyword(text))
    ):
        raise ValueError(f"{shown(text)} is no name")


def check_path(text: Any) -> None:
    """Refuse a path of a module or tensor that would end the quotes which torch puts around it.

    Raises:
        ValueError: with the text.
    """
    if not isinstance(text, str) or len(text) > _LONGEST or not _PLAIN.fullmatch(text):
        raise ValueError(f"{shown(text)} is no path of a module or tensor")


def check_size(text: Any) -> None:
    """Refuse a size that is more than arithmetic on symbols.

    Raises:
        ValueError: with the text.
    """
    for node in _nodes(text):
        if isinstance(node, ast.Call):
            _check_call(node, text, _FUNCTION)
        elif isinstance(node, ast.Constant):
            _require(_is_number(node.value) or _is_text(node.value, _IN_SIZES), text)
        elif isinstance(node, ast.Name):
            known = (_CONSTANT, _FUNCTION, _SYMBOL)
            _require(any(words.fullmatch(node.id) for words in known), text)
        elif isinstance(node, ast.keyword):
            _require(_is_small(node.value), text)
        else:
            _require(isinstance(node, (*_OPERATIONS, ast.Tuple)), text)
            _check_power(node, text)


def check_guard(text: Any) -> None:
    """Refuse a guard that is more than a comparison of the arguments' sizes.

    Raises:
        ValueError: with the text.
    """
    for node in _nodes(text):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            _check_call(node, text, _GUARD)
        elif isinstance(node, ast.Call):
            _require(isinstance(node.func, ast.Attribute) and not node.keywords, text)
        elif isinstance(node, ast.Attribute):
            is_math = isinstance(node.value, ast.Name) and node.value.id == "math"
            _require((_MATH if is_math else _METHOD).fullmatch(node.attr), text)
        elif isinstance(node, ast.Constant):
            _require(_is_number(node.value) or _is_text(node.value, _PLAIN), text)
        elif isinstance(node, ast.Name):
            _require(node.id in {"L", "math", "inf"} or _GUARD.fullmatch(node.id), text)
        else:
            _require(isinstance(node, (*_OPERATIONS, ast.Subscript)), text)
            _check_power(node, text)


def _nodes(text: Any) -> list[ast.AST]:
    is_line = isinstance(text, str) and len(text) <= _LONGEST and not set("\n\r#") & set(text)
    _require(is_line, text)
    try:
        return list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{shown(text)} is no expression") from error


def _require(is_so: object, text: Any) -> None:
    if not is_so:
        raise ValueError(f"{shown(text)} is more than an expression of sizes")


def _check_call(node: ast.Call, text: Any, known: re.Pattern[str]) -> None:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    _require(known.fullmatch(name), text)
    if _POWER.fullmatch(name):
        _require(len(node.args) == 2, text)  # noqa: PLR2004
        _check_bounded(node.args[0], node.args[1], text)


def _check_power(node: ast.AST, text: Any) -> None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        _check_bounded(node.left, node.right, text)


def _check_bounded(base: ast.AST, exponent: ast.AST, text: Any) -> None:
    """Refuse powers that grow beyond all bounds: 9**9**9 would be computed."""
    inside = [node for node in ast.walk(base) if isinstance(node, ast.BinOp | ast.Call)]
    ops = [node.op for node in inside if isinstance(node, ast.BinOp)]
    names = [n.func.id for n in inside if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    grows = any(isinstance(op, ast.Pow | ast.LShift) for op in ops) or any(
        _POWER.fullmatch(name) for name in names
    )
    _require(_is_small(exponent) and not grows, text)


def _is_small(node: ast.AST) -> bool:
    """Whether it is a small number, as it stands or as sympy writes it: ``Integer(-2)``."""
    if isinstance(node, ast.Call) and node.args:
        return all(map(_is_small, node.args))
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    value = node.value if isinstance(node, ast.Constant) else None
    return isinstance(value, int | float) and abs(value) <= _LARGEST_POWER


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_text(value: Any, words: re.Pattern[str]) -> bool:
    return isinstance(value, str) and words.fullmatch(value) is not None


def check_tree(text: Any, *, arguments: bool = False) -> None:
    """Refuse a tree of arguments or results with other types than Python's containers.

    Args:
        text: the tree as torch writes it.
        arguments: whether it is that of a call's arguments, whose keywords become Python's.

    Raises:
        ValueError: with what was found.
    """
    try:
        protocol, tree = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{shown(text)} is no tree") from error
    if protocol != 1:
        raise ValueError(f"the tree is of protocol {shown(protocol)}")
    _check_branch(tree, 0)
    if arguments:
        for keywords in tree["children_spec"][1:2]:
            for key in _keys(keywords["context"]) or ():
                check_name(key, argument=True)


def _check_branch(tree: Any, depth: int) -> None:
    if not isinstance(tree, dict) or tree.keys() != {"type", "context", "children_spec"}:
        raise ValueError(f"{shown(tree)} is no tree")
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if not isinstance(children, list) or depth > _DEEPEST:
        raise ValueError(f"{shown(tree)} is no tree, or too deep")
    if kind is None:
        if context is not None or children:
            raise ValueError(f"{shown(tree)} is no leaf")
        return
    if kind not in _TREES:
        raise ValueError(
            f"it has arguments or results of type {shown(kind)}; tuples, lists and dicts are taken"
        )
    _check_context(context, len(children), named=not kind.endswith(("tuple", "list")))
    for child in children:
        _check_branch(child, depth + 1)


def _check_context(context: Any, count: int, *, named: bool) -> None:
    keys = _keys(context)
    if not named:
        if keys is not None:
            raise ValueError(f"{shown(context)} is no context of a tuple or list")
        return
    if not isinstance(keys, list) or len(keys) != count:
        raise ValueError(f"{shown(context)} does not name the {count} entries of a dict")
    for key in keys:
        if type(key) is not int:
            check_path(key)


def _keys(context: Any) -> Any:
    """The keys of a dict: torch writes them as JSON within JSON."""
    return json.loads(context) if isinstance(context, str) else context
