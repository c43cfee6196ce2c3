"""What passes ask of a kind of branch: the seam for VeRA and its like.

Kinds stand outside of `passes` and come with every `Branch`. A pass knows when to do something and
where; its kind knows what the branch is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.fx import Node

from vera_fx.passes.engine.emit import Put
from vera_fx.passes.sites.find import Site
from vera_fx.passes.sites.inserted import InsertedBranch
from vera_fx.passes.sites.products import BaseCall


class BranchGraph(Protocol):
    """How a kind of branch is written into graphs, and read back."""

    @property
    def plans(self) -> tuple[str, ...]:
        """The plans that it has, of `vera_fx.passes.PLANS`; the first is ``"factored"``."""
        ...

    def dtype(self, tensors: Mapping[str, Node]) -> torch.dtype:
        """The dtype that the branch's input is cast to: that of its vectors."""
        ...

    def insert(
        self, put: Put, site: Site, x: Node, total: Node, tensors: Mapping[str, Node]
    ) -> Node:
        """Write the branch in factored form; gives the sum of ``total`` and the branch.

        That sum's tag says ``ends=self``. Products that equal operands may share say ``shared=True``.

        Args:
            put: inserts nodes.
            site: the site, with its target and the base's own product.
            x: the branch's input, cast to the vectors' dtype and dropped out if it is to be.
            total: the site's output so far.
            tensors: the branch's tensors by name.
        """
        ...

    def inserted(self, end: Node) -> InsertedBranch:
        """The branch that ends at a node whose tag says so, read back."""
        ...

    def scale(self, put: Put, branch: InsertedBranch) -> Node:
        """Write the branch as one scaled product; only asked of kinds with the plan ``"scaled"``."""
        ...

    def merge(self, put: Put, branch: InsertedBranch, call: BaseCall, *, through_z: bool) -> Node:
        """Write site and branch as one product by a merged weight; gives the site's output.

        Args:
            put: inserts nodes.
            branch: the branch.
            call: the base's own product, which the result takes the place of.
            through_z: take the vectors' gradients through ``z`` (plan ``"merged"``), else through the
                input (plan ``"dense"``).
        """
        ...


@dataclass(frozen=True, slots=True)
class Branch:
    """One adapter's branch at one target.

    Attributes:
        kind: its kind.
        tensors: the attribute path of each of its tensors, by name.
        dropout: probability of dropping an element of the branch's input; 0 in eval mode.
    """

    kind: BranchGraph
    tensors: Mapping[str, str]
    dropout: float = 0.0
