"""Compute ``x @ A.T`` once where several sites read the same input."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import tag_of, written_between
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip


@dataclass(frozen=True, slots=True)
class ShareProjection:
    """Reuse casts, cuts and products ``x @ A.T`` among sites with equal operands (q, k, v).

    VeRA shares A across layers, so these products are equal by construction and not by chance:
    with k sites on one input this saves k - 1 of k products of T*I*R, and in backward autograd
    adds the k gradients of Z before one product with A.

    Before::

        %query_weight: f32[5, 3] = query.weight
        %value_weight: f32[5, 3] = value.weight
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 3] = slot.vera_A
        %slot_vera_b: f32[5, 2] = slot.vera_B
        %slot_query_d: f32[2] = slot.query_d
        %slot_query_b: f32[5] = slot.query_b
        %slot_value_d: f32[2] = slot.value_d
        %slot_value_b: f32[5] = slot.value_b
        %linear: f32[s0, 5] = linear(%x, %query_weight)
        %z: f32[s0, 2] = linear(%x, %slot_vera_a)
        %h: f32[s0, 2] = mul(%z, %slot_query_d)
        %u: f32[s0, 5] = linear(%h, %slot_vera_b)
        %update: f32[s0, 5] = mul(%u, %slot_query_b)
        %add: f32[s0, 5] = add(%linear, %update)
        %linear_1: f32[s0, 5] = linear(%x, %value_weight)
        %z_1: f32[s0, 2] = linear(%x, %slot_vera_a)
        %h_1: f32[s0, 2] = mul(%z_1, %slot_value_d)
        %u_1: f32[s0, 5] = linear(%h_1, %slot_vera_b)
        %update_1: f32[s0, 5] = mul(%u_1, %slot_value_b)
        %add_1: f32[s0, 5] = add(%linear_1, %update_1)
        return [%add, %add_1]

    After::

        %query_weight: f32[5, 3] = query.weight
        %value_weight: f32[5, 3] = value.weight
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 3] = slot.vera_A
        %slot_vera_b: f32[5, 2] = slot.vera_B
        %slot_query_d: f32[2] = slot.query_d
        %slot_query_b: f32[5] = slot.query_b
        %slot_value_d: f32[2] = slot.value_d
        %slot_value_b: f32[5] = slot.value_b
        %linear: f32[s0, 5] = linear(%x, %query_weight)
        %z: f32[s0, 2] = linear(%x, %slot_vera_a)
        %h: f32[s0, 2] = mul(%z, %slot_query_d)
        %u: f32[s0, 5] = linear(%h, %slot_vera_b)
        %update: f32[s0, 5] = mul(%u, %slot_query_b)
        %add: f32[s0, 5] = add(%linear, %update)
        %linear_1: f32[s0, 5] = linear(%x, %value_weight)
        %h_1: f32[s0, 2] = mul(%z, %slot_value_d)
        %u_1: f32[s0, 5] = linear(%h_1, %slot_vera_b)
        %update_1: f32[s0, 5] = mul(%u_1, %slot_value_b)
        %add_1: f32[s0, 5] = add(%linear_1, %update_1)
        return [%add, %add_1]

    Needs: branches inserted by `InsertBranches`.
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
            if tag is None:
                continue
            if tag.role == "dropout":
                skips.append(Skip(tag.site, Reason.OWN_MASKS))
            if not tag.shared:
                continue
            original = first.setdefault(_key(node), node)
            if original is node:
                continue
            if not _reads_slots_only(node) and written_between(original, node):
                skips.append(Skip(tag.site, Reason.WRITTEN_BETWEEN, str(node.args[0])))
                first[_key(node)] = node
                continue
            node.replace_all_uses_with(original)
            gm.graph.erase_node(node)
            rewrites.append(Rewrite(tag.site, Action.SHARED, _site(original), tag.role))
        return PassReport(tuple(rewrites), tuple(skips))


def _reads_slots_only(node: Node) -> bool:
    """True if nothing but the adapter's own tensors is read, which no captured operator writes to."""
    made_by_passes = tag_of(node) is not None
    return made_by_passes and all(_reads_slots_only(source) for source in node.all_input_nodes)


def _key(node: Node) -> tuple[Any, ...]:
    return (node.target, *node.args)


def _site(node: Node) -> str:
    tag = tag_of(node)
    return tag.site if tag is not None else node.name
