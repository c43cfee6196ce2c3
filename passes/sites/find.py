"""Finds the sites: the calls in a captured graph that compute a target's own product."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from vera_fx.passes.engine.protocol import SiteError
from vera_fx.passes.sites.products import BaseCall, BaseProduct
from vera_fx.passes.sites.target import Target


@dataclass(frozen=True, slots=True)
class Site:
    """One call of a target: ``node`` computes its product, ``x @ W.T (+ bias)``."""

    target: Target
    node: Node
    index: int

    @property
    def call(self) -> BaseCall:
        """The call as the graph has it now: adapting a site before it changes it."""
        found = self.target.product.call(self.node)
        if found is None:
            raise SiteError(
                f"{self.node.name} of target {self.target.path!r} is a call of it no more"
            )
        return found

    @property
    def x(self) -> Node:
        """The call's input as the graph has it now."""
        return self.call.x

    @property
    def name(self) -> str:
        """The target's path, with ``#2``, ``#3``... for its further calls in one graph."""
        return self.target.path if self.index == 0 else f"{self.target.path}#{self.index + 1}"


@dataclass(frozen=True, slots=True)
class SiteSearch:
    """All sites of a graph, in order, and the targets that the graph never calls."""

    sites: tuple[Site, ...]
    uncalled: tuple[str, ...]


def find_sites(gm: GraphModule, targets: Sequence[Target]) -> SiteSearch:
    """Find every site of ``targets`` in ``gm``.

    Raises:
        SiteError: a target is used in a way that cannot be adapted. Nothing is left out in silence.
    """
    by_path = {path: target for target in targets for path in target.paths}
    kinds: dict[type[BaseProduct], list[Target]] = {}
    for target in targets:
        kinds.setdefault(type(target.product), []).append(target)
    calls: dict[Node, Target] = {}
    for alike in kinds.values():
        calls |= alike[0].product.calls(gm, alike, by_path)
    sites: list[Site] = []
    counts: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if (target := calls.get(node)) is not None:
            sites.append(Site(target, node, counts[target.path]))
            counts[target.path] += 1
    return SiteSearch(
        tuple(sites), tuple(target.path for target in targets if not counts[target.path])
    )
