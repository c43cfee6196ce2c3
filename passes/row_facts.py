"""Which positions of every tensor in a graph belong to which row of the batch.

A batch that mixes adapters needs to know, at every site, whose adapter serves a position. That is
proven along the graph, operator by operator: an operator that no rule knows loses the proof, and a
site behind it is refused. Nothing is guessed from sizes.
"""

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from ._graph import schema_of, storage_root
from .row_rules import fact_of
from .rows import Fact, Lost, RowFacts, Rows, shape_of


def row_facts(gm: GraphModule, batched: frozenset[int]) -> RowFacts:
    """Follow the rows of the batch through a graph.

    Args:
        gm: the graph.
        batched: numbers of the inputs that hold one row per index of their first dimension.
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    facts = RowFacts(tuple(shape_of(inputs[number])[0] for number in sorted(batched)))
    for number in batched:
        facts.learn(inputs[number], Rows(0, shape_of(inputs[number])[0]))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            facts.learn(node, fact_of(node, facts))
            for written, fact in list(_written(node, facts)):
                facts.learn(written, fact)
    return facts


def _written(node: Node, facts: RowFacts) -> Iterator[tuple[Node, Fact]]:
    """What an operator that writes to its first argument leaves in all tensors of that storage."""
    target = node.args[0] if node.args else None
    if not isinstance(target, Node) or not _writes_first(node):
        return
    root = storage_root(target)
    sharing = [n for n in facts.nodes() if n is not node and storage_root(n) is root]
    if target is root and not [n for n in sharing if n is not root]:
        yield root, facts.of(node)
    elif facts.of(node) is not None or any(facts.of(n) is not None for n in sharing):
        for shared in {root, *sharing, node}:
            yield shared, Lost(f"{node.name} writes to a part of {root.name}")


def _writes_first(node: Node) -> bool:
    schema = schema_of(node)
    alias = schema.arguments[0].alias_info if schema is not None and schema.arguments else None
    return alias is not None and alias.is_write
