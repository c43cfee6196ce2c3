"""Graphs as text, stable across torch versions."""

import re
from typing import cast

from torch import Tensor
from torch.fx import GraphModule, Node


def graph_text(gm: GraphModule) -> str:
    """The graph as text: operator, operands, dtype and shape of every node, a line each.

    Sizes left open are called s0, s1... in order of appearance. Stable across torch versions
    (unlike ``gm.code``), so that docstrings can quote it.
    """
    symbols: dict[str, str] = {}
    return "\n".join(
        _node_text(node, type_text(node.meta.get("val"), symbols)) for node in gm.graph.nodes
    )


def _node_text(node: Node, kind: str) -> str:
    if node.op == "output":
        return f"return {_operand(node.args[0])}"
    head = f"%{node.name}{kind} = "
    if node.op in {"placeholder", "get_attr"}:
        return f"{head}{'input' if node.op == 'placeholder' else node.target}"
    operands = [_operand(arg) for arg in node.args]
    operands += [f"{key}={_operand(arg)}" for key, arg in node.kwargs.items()]
    return f"{head}{_target_text(node.target)}({', '.join(operands)})"


def _target_text(target: object) -> str:
    text = str(target) if not callable(target) else getattr(target, "__name__", str(target))
    return re.sub(r"\.(default|Tensor|Scalar)$", "", text)


def _operand(arg: object) -> str:
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, list | tuple):
        return f"[{', '.join(_operand(item) for item in cast('list[object]', arg))}]"
    return str(arg)


def type_text(value: object, symbols: dict[str, str]) -> str:
    """Dtype and shape, open sizes by the names that ``symbols`` has for them or now gets."""
    return renamed(_plain_type_text(value), symbols)


def renamed(text: str, symbols: dict[str, str]) -> str:
    """``text`` with open sizes called s0, s1... in order of appearance."""
    return re.sub(r"\bs\d+\b", lambda m: symbols.setdefault(m[0], f"s{len(symbols)}"), text)


def _plain_type_text(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = re.sub(
            r"^float|^bfloat", lambda m: "f" if m[0] == "float" else "bf", str(value.dtype)[6:]
        )
        return f": {dtype}[{', '.join(str(size) for size in value.shape)}]"
    return "" if value is None else f": {type(value).__name__}"
