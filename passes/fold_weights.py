"""Give every site of a target a weight of its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import Put, attribute
from vera_fx.passes.engine.graph import Tag, tensor_of
from vera_fx.passes.engine.protocol import Numerics, SiteError
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip
from vera_fx.passes.sites.find import Site, find_sites
from vera_fx.passes.sites.target import Target

aten = torch.ops.aten

_ME = "FoldWeights"


@dataclass(frozen=True, slots=True)
class FoldWeights:
    """Let the sites of the targets read other weights: those with an adapter folded in.

    Whatever else reads the base's weight goes on reading it: the embedding that a head is tied to,
    or another tied layer. A weight that is computed on the way (parametrised) is replaced by its
    folded value, and its computation leaves the graph.

    Before::

        %embed_weight: f32[5, 3] = embed.weight
        %head_weight: f32[5, 3] = head.weight
        %x: f32[s0, 3] = input
        %linear: f32[s0, 5] = linear(%x, %head_weight)
        %linear_1: f32[s0, 5] = linear(%x, %head_weight)
        return [%linear, %linear_1]

    After::

        %embed_weight: f32[5, 3] = embed.weight
        %head_weight: f32[5, 3] = head.weight
        %x: f32[s0, 3] = input
        %folded_head: f32[5, 3] = folded.head
        %linear: f32[s0, 5] = linear(%x, %head_weight)
        %linear_1: f32[s0, 5] = linear(%x, %folded_head)
        return [%linear, %linear_1]

    Needs: the folded weights as attributes of the graph's owner, in the layout of the base's.
    Keeps: every other reader of a weight.
    Skips: a target that this graph never calls.
    """

    numerics: ClassVar[Numerics] = Numerics.INTENDED
    targets: tuple[Target, ...]
    weights: tuple[str, ...]
    """Attribute paths of the folded weights, one per target."""

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Replace the weight of every site.

        Raises:
            SiteError: a target is used in a way that cannot be adapted.
        """
        search = find_sites(gm, self.targets)
        paths = dict(zip((t.path for t in self.targets), self.weights, strict=True))
        todo = [site for site in search.sites if not _reads(site, paths[site.target.path])]
        for site in todo:
            _fold(gm, site, paths[site.target.path])
        return PassReport(
            tuple(Rewrite(site.name, Action.REDIRECTED, paths[site.target.path]) for site in todo),
            tuple(Skip(path, Reason.NEVER_CALLED) for path in search.uncalled),
        )


def _reads(site: Site, path: str) -> bool:
    weight = site.call.weight
    return weight is not None and weight.target == path


def _fold(gm: GraphModule, site: Site, path: str) -> None:
    call, put = site.call, Put(gm, _ME, site.name, site.node)
    old = call.weight
    if old is None:
        raise SiteError(f"the weight of target {site.target.path!r} is not read by the graph")
    new = attribute(gm, path, like=old, tag=Tag(_ME, site.name, "folded"))
    with gm.graph.inserting_before(site.node):
        if call.layout != site.target.product.layout:
            new = put(aten.transpose.int, new, 0, 1, role="folded")
        new = put.cast(new, tensor_of(old).dtype, role="folded")
    site.node.replace_input_with(old, new)
    _erase_unread(gm, old)


def _erase_unread(gm: GraphModule, node: Node) -> None:
    """Take out what computed the weight, as far as nothing else reads it."""
    if node.users or node.op == "placeholder" or node.is_impure():
        return
    operands = node.all_input_nodes
    gm.graph.erase_node(node)
    for operand in operands:
        _erase_unread(gm, operand)
