"""Let the graph read an adapter's own copy of a parameter instead of the base model's."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import attribute
from vera_fx.passes.engine.graph import Tag, owner_path
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip
from vera_fx.passes.sites.trained_bias import add_changes, is_change

_ME = "RedirectParameters"


@dataclass(frozen=True, slots=True)
class Redirect:
    """One parameter or buffer of a module, and the copy to read in its place.

    Attributes:
        module: path of the module whose reads are redirected; nothing for all.
        bases: every attribute path of the base's tensor; more than one if it is tied, and then
            only reads made inside ``module`` are redirected.
        copy: attribute path of the copy.
    """

    module: str
    bases: tuple[str, ...]
    copy: str


@dataclass(frozen=True, slots=True)
class RedirectParameters:
    """Replace reads of base parameters by reads of the adapter's trained copies.

    This is how ``modules_to_save`` and trained biases work without touching the base: the copies
    belong to the adapter, so that switching or disabling it brings the base's values back.

    Before::

        %head_weight: f32[5, 3] = head.weight
        %x: f32[s0, 3] = input
        %linear: f32[s0, 5] = linear(%x, %head_weight)
        return [%linear]

    After::

        %x: f32[s0, 3] = input
        %slot_head_weight: f32[5, 3] = slot.head_weight
        %linear: f32[s0, 5] = linear(%x, %slot_head_weight)
        return [%linear]

    The bias of a module that the graph calls is added by code of the module's own; behind its calls
    the graph adds ``copy - base`` (`vera_fx.passes.sites.trained_bias`).

    Needs: the copies as attributes of the graph's owner, in the base parameters' shapes.
    Keeps: everything else.
    Skips: a parameter that this graph never reads.
    """

    numerics: ClassVar[Numerics] = Numerics.INTENDED
    redirects: tuple[Redirect, ...]

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Redirect every read."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for redirect in self.redirects:
            users = _users(gm, redirect)
            added = add_changes(gm, redirect.bases, redirect.copy, redirect.module, _ME)
            for read, user in users:
                copy = attribute(gm, redirect.copy, like=read, tag=Tag(_ME))
                user.replace_input_with(read, copy)
                if not read.users:
                    gm.graph.erase_node(read)
            if users or added:
                rewrites.append(Rewrite(redirect.bases[0], Action.REDIRECTED, redirect.copy))
            elif not _is_read(gm, redirect.copy):
                skips.append(Skip(redirect.bases[0], Reason.NEVER_READ))
        return PassReport(tuple(rewrites), tuple(skips))


def _users(gm: GraphModule, redirect: Redirect) -> list[tuple[Node, Node]]:
    """(read, user) for every use of the base's tensor that the redirect is about."""
    reads = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target in redirect.bases]
    tied = len(redirect.bases) > 1
    return [
        (read, user)
        for read in reads
        for user in read.users
        if not is_change(user) and (not tied or _is_inside(owner_path(user), redirect.module))
    ]


def _is_inside(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")


def _is_read(gm: GraphModule, target: str) -> bool:
    return any(node.op == "get_attr" and node.target == target for node in gm.graph.nodes)
