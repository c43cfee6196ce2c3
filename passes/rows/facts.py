"""Which positions of every tensor in a graph belong to which row of the batch.

A batch that mixes adapters needs to know, at every site, whose adapter serves a position. That is
proven along the graph, operator by operator: an operator that no rule knows loses the proof, and a
site behind it is refused. Nothing is guessed from sizes.
"""

from collections.abc import Iterator

from torch import Tensor
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import module_stack, schema_of, storage_root, value_of
from vera_fx.passes.rows.rules import fact_of
from vera_fx.passes.rows.vocabulary import Fact, Lost, RowFacts, Rows, same, shape_of


def row_facts(
    gm: GraphModule, batched: frozenset[int], tokenwise: frozenset[str] = frozenset()
) -> RowFacts:
    """Follow the rows of the batch through a graph.

    Args:
        gm: the graph.
        batched: numbers of the inputs that hold one row per index of their first dimension.
        tokenwise: paths of modules that treat every index of their inputs' first dimension by
            itself and return them in order, whatever their operators do on the way.
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    facts = RowFacts(tuple(shape_of(inputs[number])[0] for number in sorted(batched)))
    for number in batched:
        facts.learn(inputs[number], Rows(0, shape_of(inputs[number])[0]))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            fact = fact_of(node, facts)
            if tokenwise and isinstance(fact, Lost):
                fact = _left_by(node, tokenwise, facts) or fact
            facts.learn(node, fact)
            for written, fact in list(_written(node, facts)):
                facts.learn(written, fact)
    return facts


def _left_by(node: Node, tokenwise: frozenset[str], facts: RowFacts) -> Fact:
    """The rows of what a tokenwise module returns: those of all that it was given."""
    call = next((key for key, path in module_stack(node) if path in tokenwise), None)
    leaves = call is not None and any(call not in _calls(user) for user in node.users)
    if not leaves or not isinstance(value_of(node), Tensor):
        return None
    inside = [n for n in node.graph.nodes if call in _calls(n)]
    given = {n for i in inside for n in i.all_input_nodes if call not in _calls(n)}
    known = {n: fact for n, fact in facts.all_of(*given) if fact is not None}
    rows = [fact for fact in known.values() if isinstance(fact, Rows) and fact.dim == 0]
    tokens = shape_of(node)[0]
    kept = len(rows) == len(known) and all(fact.agrees(rows[0]) for fact in rows)
    if not rows or not kept or not all(same(shape_of(n)[0], tokens) for n in known):
        return None
    return rows[0].under(0)


def _calls(node: Node) -> set[str]:
    return {key for key, _ in module_stack(node)}


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
