"""Base products that graphs call: modules over weights that only their own library can read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from vera_fx.passes.engine.functions import call_module
from vera_fx.passes.engine.graph import is_call, node_arg
from vera_fx.passes.sites.products import BaseCall
from vera_fx.passes.sites.target import Target


@dataclass(frozen=True, slots=True)
class CalledModule:
    """A product by a module that the graph calls, as quantised linear layers are.

    No graph reads the weight, so that no plan can fold into it; ``scaled`` reads nothing of the base.

    Attributes:
        make: whose module it is, for reports.
    """

    make: str = ""

    @property
    def plans(self) -> tuple[str, ...]:
        """Those that leave the base's product alone."""
        return ("factored", "scaled")

    @property
    def layout(self) -> str:
        """None: no graph reads the weight."""
        return ""

    def calls(
        self, gm: GraphModule, targets: Sequence[Target], by_path: Mapping[str, Target]
    ) -> Mapping[Node, Target]:
        """Every call of the targets' modules."""
        own = {path: target for target in targets for path in target.paths}
        del by_path
        return {node: own[path] for node, path in called_modules(gm) if path in own}

    def call(self, node: Node) -> BaseCall | None:
        """The call at ``node``."""
        if not is_call(node, call_module) or (x := node_arg(node, 1)) is None:
            return None
        return BaseCall(node, x, None, None, "")


def called_modules(gm: GraphModule) -> list[tuple[Node, str]]:
    """Every node that calls a module, with the module's path."""
    found: list[tuple[Node, str]] = []
    for node in gm.graph.nodes:
        holder = node_arg(node, 0) if is_call(node, call_module) else None
        if holder is not None:
            found.append((node, str(holder.target)))
    return found
