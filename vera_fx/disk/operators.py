"""Names of operators in a file: which are let through, so that a graph from a file runs nothing else."""

import re
from collections.abc import Collection

from vera_fx._torch import operator_arguments
from vera_fx.errors import listing, shown

_CALL = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?")
_NUMBERS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|and_|or_|xor|not_|lshift|rshift|eq|ne|lt|"
    r"le|gt|ge|getitem|invert)|"
    r"math\.(ceil|floor|trunc|sqrt|pow|exp|log|log2|sin|cos|tan|asin|acos|atan|sinh|cosh|tanh)|"
    r"torch\.(sym_(int|float|max|min|not|ite|sum|sqrt)|_sym_\w+)"
)
_HIGHER = frozenset(
    (
        "associative_scan",
        "auto_functionalized",
        "auto_functionalized_v2",
        "cond",
        "flex_attention",
        "map_impl",
        "out_dtype",
        "scan",
        "strict_mode",
        "tag_activation_checkpoint",
        "while_loop",
        "wrap",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    )
)
_OWN = frozenset(("aten", "prims"))
_FILES = frozenset(("filename", "file", "path", "url"))


def check_operator(text: str, namespaces: Collection[str]) -> None:
    """Refuse what is neither an operator nor a function on numbers.

    Args:
        text: its name, as torch writes it to files.
        namespaces: of operators that may be called beside torch's own.

    Raises:
        ValueError: with the name.
    """
    call = _CALL.fullmatch(text)
    if _NUMBERS.fullmatch(text):
        return
    if call is None:
        raise ValueError(f"it calls {shown(text)}, which is no operator")
    namespace, name, overload = call.groups()
    if namespace == "higher_order":
        if name not in _HIGHER or overload is not None:
            raise ValueError(f"it calls {shown(text)}; of that kind are taken {listing(_HIGHER)}")
    elif namespace not in {*_OWN, *namespaces}:
        raise ValueError(
            f"it calls {shown(text)}; of its own accord load_program takes operators of "
            f"{listing(sorted({*_OWN, *namespaces}))} (namespaces=[{namespace!r}] trusts those too)"
        )
    else:
        _check_overload(text, namespace, name, overload or "default")


def _check_overload(text: str, namespace: str, name: str, overload: str) -> None:
    arguments = operator_arguments(namespace, name, overload)
    if arguments is None:
        raise ValueError(f"it calls {shown(text)}, which this torch does not have")
    if any("str" in kind for argument, kind in arguments.items() if argument in _FILES):
        raise ValueError(f"it calls {shown(text)}, which reads or writes files")
