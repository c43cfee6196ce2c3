"""Compute ``x @ A.T`` once where several sites read the same input."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from ._graph import tag_of, written_between
from ._protocol import Numerics, PassReport, Rewrite, Skip

_SHARED = ("cast_in", "cut_A", "cut_B", "z")


@dataclass(frozen=True, slots=True)
class ShareProjection:
    """Reuse casts, cuts and products ``x @ A.T`` among sites with equal operands (q, k, v).

    VeRA shares A across layers, so these products are equal by construction and not by chance:
    with k sites on one input this saves k - 1 of k products of T*I*R, and in backward autograd
    adds the k gradients of Z before one product with A.

    Before::

        %x: f32[s0, 3] = input
        %A: f32[2, 3] = A
        %z1: f32[s0, 2] = linear(%x, %A)
        %z2: f32[s0, 2] = linear(%x, %A)
        return [%z1, %z2]

    After::

        %x: f32[s0, 3] = input
        %A: f32[2, 3] = A
        %z1: f32[s0, 2] = linear(%x, %A)
        return [%z1, %z1]

    Needs: branches inserted by `InsertVera`.
    Keeps: every output bit for bit; gradients to rounding.
    Skips: products behind dropout (each site draws its own mask), and products whose input is
    changed in place between the two.
    """

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Let later equal nodes reuse the first."""
        first: dict[tuple[Any, ...], Node] = {}
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for node in list(gm.graph.nodes):
            tag = tag_of(node)
            if tag is None or tag.made_by != "InsertVera":
                continue
            if tag.role == "dropout":
                skips.append(Skip(tag.site, "adapter dropout draws its own mask at every site"))
            if tag.role not in _SHARED:
                continue
            original = first.setdefault(_key(node), node)
            if original is node:
                continue
            if written_between(original, node):
                skips.append(Skip(tag.site, f"{node.args[0]} may be changed in place before it"))
                first[_key(node)] = node
                continue
            node.replace_all_uses_with(original)
            gm.graph.erase_node(node)
            rewrites.append(Rewrite(tag.site, f"{tag.role} shared with {_site(original)}"))
        return PassReport(tuple(rewrites), tuple(skips))


def _key(node: Node) -> tuple[Any, ...]:
    return (node.target, *node.args)


def _site(node: Node) -> str:
    tag = tag_of(node)
    return tag.site if tag is not None else node.name
