"""VeRA's branch beside a product that is cut over processes.

Every process has A, B and the vectors as a whole, which are small. Column-wise (``cut.of == "out"``) a process
makes its columns of the output by its rows of B and b. Row-wise (``cut.of == "in"``) it makes its part of a sum by
its columns of A. In graphs the branch stands where the base's own product does: behind the node that will
sum gradients of the input, and before the one that sums outputs. So what the branch adds travels with what
the base sends anyway, and only gradients of d and b are summed for its sake: r + out numbers.

Shape letters: L leading dims, I in_features, O out_features, R rank.
"""

from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from vera_fx._torch_parallel import part_from, sum_over
from vera_fx.passes import Cut, Put, Target, tensor_of


def parted(put: Put, target: Target, d: Node, b: Node) -> tuple[Node, Node]:
    """The whole vectors as this process's part of the branch reads them: ``d`` and its entries of ``b``."""
    cut = target.cut
    if cut is None or not cut.of:
        return d, b
    d, b = (
        put(part_from, node, cut.group, role=f"{role}_parted", shape=tensor_of(node).shape)
        for node, role in ((d, "d"), (b, "b"))
    )
    return d, put.cut(b, dim=0, entries=target.columns_out, role="cut_b")


def cut_branch(x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, cut: Cut) -> Tensor:
    """`vera_fx.branches.vera.reference.vera_branch`, of which this process computes its part.

    Args:
        x: what it has of the input, ``(*L, I)`` or some columns of it.
        A: whole, ``(R, max_in)``.
        B: whole, ``(max_out, R)``.
        d: whole, ``(R,)``.
        b: whole, ``(O,)``.
        cut: how the target is cut.

    Returns:
        ``(*L, O)``, or this process's columns of it.
    """
    own = slice(cut.start, cut.start + cut.size)
    if cut.of == "in":
        z = sum_over(F.linear(x, A[:, own]), cut.group)
        return b * F.linear(d * z, B[: len(b)])
    z = F.linear(x, A[:, : x.shape[-1]])
    if cut.of == "out":
        z, d, b = (part_from(tensor, cut.group) for tensor in (z, d, b))
        return b[own] * F.linear(d * z, B[own])
    return b * F.linear(d * z, B[: len(b)])
