"""What graphs call for a linear layer under tensor parallelism: its product, and sums over processes.

The weight is a ``DTensor``, of which the product reads this process's part, so that nothing of
``DTensor`` runs in a graph. The module's style says what goes in and comes out (`vera_fx.products.parallel`).

Shape letters: L leading dims, I in_features, O out_features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from vera_fx._torch_parallel import joined, part_from, sum_over
from vera_fx.passes import BaseCall, Target


def column_linear(module: nn.Module, x: Tensor) -> Tensor:
    """This process's columns of ``x @ W.T + bias``, for an ``x (*L, I)`` that is whole.

    The input's gradient is this process's part of it, which `part_from` before the call sums.
    """
    return F.linear(x, _own(module.weight), _own(module.bias))


def row_linear(module: nn.Module, x: Tensor) -> Tensor:
    """This process's part of ``x @ W.T``, by its columns of ``x``; `row_sum` makes the whole of it."""
    return F.linear(x, _own(module.weight))


def row_sum(module: nn.Module, y: Tensor, group: str) -> Tensor:
    """The sum of all processes' ``y (*L, O)``, and the bias."""
    y, bias = sum_over(y, group), _own(module.bias)
    return y if bias is None else y + bias.to(y.dtype)


def joined_linear(
    module: nn.Module, x: Tensor, group: str, rank: int, world: int, width: int
) -> Tensor:
    """`column_linear` of a whole ``x``, with all processes' columns joined: ``(*L, O)``."""
    y = column_linear(module, part_from(x, group))
    return joined(y, group, rank, world, width)


def split_linear(module: nn.Module, x: Tensor, group: str, start: int, stop: int) -> Tensor:
    """`row_linear` for an ``x (*L, I)`` that is whole, and the sum: whole."""
    y = row_linear(module, part_from(x, group)[..., start:stop])
    return row_sum(module, y, group)


def rows_embedding(module: nn.Module, ids: Tensor, group: str, start: int, stop: int) -> Tensor:
    """The embedding of ``ids (*L, 1)``, of which this process has rows ``start`` to ``stop``: ``(*L, I)``."""
    ids = ids.squeeze(-1)
    own = (ids >= start) & (ids < stop)
    found = F.embedding((ids - start) * own, _own(module.weight))
    return sum_over(found * own.unsqueeze(-1), group)


def _own(tensor: Any) -> Any:
    """This process's part of a parameter, which is a ``DTensor``."""
    return None if tensor is None else tensor.to_local()


FUNCTIONS: tuple[Callable[..., Tensor], ...] = (
    column_linear,
    row_linear,
    joined_linear,
    split_linear,
)


Call = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""A function and the arguments behind its first ones."""


@dataclass(frozen=True, slots=True)
class BaseCalls:
    """What stands in a graph for one call of a parallel layer.

    Attributes:
        call: of the module and the input; what branches stand beside.
        before: of the input.
        after: of the module and what ``call`` gave.
    """

    call: Call
    before: Call | None = None
    after: Call | None = None


@dataclass(frozen=True, slots=True)
class CutLinear:
    """A product by a part of a weight, in graphs a call of one of `FUNCTIONS`.

    Attributes:
        make: what it is, for reports and messages.
    """

    make: str = "a layer under tensor parallelism"

    @property
    def plans(self) -> tuple[str, ...]:
        """Those that leave the base's product alone."""
        return ("factored", "scaled")

    @property
    def layout(self) -> str:
        """As in ``nn.Linear``; merging adds this process's part."""
        return "out_in"

    def calls(
        self, gm: GraphModule, targets: Sequence[Target], by_path: Mapping[str, Target]
    ) -> Mapping[Node, Target]:
        """Every call for the targets' modules."""
        del by_path
        own = {path: target for target in targets for path in target.paths}
        found = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in FUNCTIONS]
        holders = {node: str(node.args[0].target) for node in found}
        return {node: own[path] for node, path in holders.items() if path in own}

    def call(self, node: Node) -> BaseCall | None:
        """The call at ``node``."""
        x = node.args[1] if node.op == "call_function" and node.target in FUNCTIONS else None
        return BaseCall(node, x, None, None, "") if isinstance(x, Node) else None
