"""Where a layer's function begins: at what is kept for backward, not at what is computed again."""

from collections.abc import Sequence

from torch.fx import Node

from vera_fx.passes.engine.functions import recomputed
from vera_fx.passes.engine.graph import is_call
from vera_fx.passes.engine.outlining import Run, fingerprint, inputs_of


def at_what_is_kept(layers: Sequence[Run]) -> list[Run]:
    """The layers, each with the `recomputed` calls that only it reads, without those of the next.

    What crosses the edge of a function is kept for backward. Where layers end in a norm (as those
    of BERT do), that would be its result, and its operand as well, for the norm's own gradient.
    Begun by the norm before it, a layer keeps the operand only. The last layer's norm, which no
    layer follows, is left outside, so that all layers stay equal.

    Layers stay as they are if more kinds of them would come out.
    """
    heads = [_head(run) for run in layers]
    moved = {node for head in heads for node in head}
    if not moved:
        return list(layers)
    kinds = [node.args[0] for node in moved]
    found: list[Run] = []
    for run, head in zip(layers, heads, strict=True):
        nodes = [node for node in run.nodes if node not in moved]
        if head and nodes and is_call(nodes[-1], *kinds):
            nodes.pop()
        found.append(Run(run.path, (*head, *nodes)))
    return found if _kinds(found) <= _kinds(layers) else list(layers)


def _head(run: Run) -> list[Node]:
    inside = set(run.nodes)
    return [
        node
        for node in inputs_of(run.nodes)
        if is_call(node, recomputed) and inside.issuperset(node.users)
    ]


def _kinds(runs: Sequence[Run]) -> int:
    return len({fingerprint(run.nodes) for run in runs})
