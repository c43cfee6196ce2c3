"""Parts of one model that are equal share a capture: what was captured of one layer, moved to another.

They are equal if all that their code may read is, by content; but for attributes that are plain values
(a layer's number), which may differ if nothing asked for them while the first was captured.
"""

import itertools
import weakref
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from vera_fx._torch_graphs import copy_of
from vera_fx.base.modules import in_bank, original_class
from vera_fx.caching.attribute_reads import ALL
from vera_fx.caching.captures import captured
from vera_fx.caching.content import Unreadable
from vera_fx.caching.key import key_of
from vera_fx.capturing.budget import Opening
from vera_fx.capturing.export_call import CONSTANT, Capture, Exported, cleaned
from vera_fx.capturing.facts import fact
from vera_fx.capturing.signature import Call, CallReader

_LIMIT = 64
"""Captures of one key that are looked at: of layers that differ in what was asked for."""


@dataclass(frozen=True, slots=True)
class PartCall:
    """A call of a part, as something that another part's may be equal to.

    Attributes:
        path: the part's path.
        key: the hash of all that its code may read, without the attributes that are plain values.
        values: these, by path of the module in the part and name.
    """

    path: str
    key: str
    values: Mapping[tuple[str, str], Any]

    @classmethod
    def of(
        cls, model: nn.Module, path: str, call: Call, opening: Opening, settings: Any
    ) -> "PartCall | None":
        """Args: as for `vera_fx.caching.captures.captured`. None if something in it has no hash."""
        part = model.get_submodule(path)
        values: dict[tuple[str, str], Any] = {}
        try:
            forward = original_class(part).forward
            key = key_of(part, forward, call, opening, settings, values, model)
        except Unreadable:
            return None
        return cls(path, key, values)

    def differs_in(self, other: "PartCall") -> set[str]:
        """The names of attributes that are not the same in another part of the same key."""
        names = self.values.keys() | other.values.keys()
        return {name[1] for name in names if _of(self, name) != _of(other, name)}


_MISSING = object()


def _of(part: PartCall, name: tuple[str, str]) -> Hashable:
    return fact(part.values.get(name, _MISSING))


@dataclass(frozen=True, slots=True)
class _Captured:
    part: PartCall
    asked: frozenset[str]
    capture: "weakref.ref[Capture]"


@dataclass(slots=True)
class EqualParts:
    """The captures of a model's parts that other parts may take over.

    Attributes:
        shared: how many captures were.
        groups: a number for each capture that is kept, the same for those that were made from one.
        apart: for captures that another part's could have been, but for attributes that were asked for,
            the names of these.
    """

    shared: int = 0
    groups: "weakref.WeakKeyDictionary[Capture, int]" = field(
        default_factory=weakref.WeakKeyDictionary
    )
    apart: "weakref.WeakKeyDictionary[Capture, frozenset[str]]" = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _known: dict[str, list[_Captured]] = field(default_factory=dict[str, list[_Captured]])
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def captured(
        self,
        model: nn.Module,
        entry: tuple[str, Any, CallReader, set[str]],
        call: Call,
        opening: Opening,
        settings: Any,
    ) -> Capture:
        """The capture of a call of a part: an equal part's, or a new one.

        Args:
            model: the live model.
            entry: the part's path; its forward as one of the model, the reader that took ``call`` apart,
                and the set that the forward adds the attributes to that it asks for.
            call: the call.
            opening: which sizes to leave open.
            settings: what of torch's settings a graph may have baked in.

        Raises:
            CaptureError: torch.export cannot trace the call.
        """
        path, forward, reader, asked = entry
        part = PartCall.of(model, path, call, opening, settings)
        found = part and self._find(model, part, call)
        if found is not None:
            return found
        asked.clear()
        capture = captured(model, (forward, reader), call, opening, settings)
        self.groups[capture] = next(self._numbers)
        if part is not None:
            # A capture that was kept by another process ran no code here: it may have asked for anything.
            self._note(part, frozenset(asked) or frozenset({ALL}), capture)
        return capture

    def _note(self, part: PartCall, asked: frozenset[str], capture: Capture) -> None:
        known = self._known.get(part.key, [])
        self.apart[capture] = frozenset[str]().union(*(_between(part, k) for k in known))
        found = self._known.setdefault(part.key, [])
        found[:] = [known for known in found if known.capture() is not None][-_LIMIT:]
        found.append(_Captured(part, asked, weakref.ref(capture)))

    def _find(self, model: nn.Module, part: PartCall, call: Call) -> Capture | None:
        """The capture of a part that is equal, as one of this part; None if there is none."""
        for known in self._known.get(part.key, []):
            capture = known.capture()
            if capture is None or _between(part, known):
                continue
            if not capture.guards.admit(call.leaves):
                continue
            moved = _moved(capture, model, known.part.path, part.path)
            if moved is not None:
                self.shared += 1
                own = cleaned(model, call, moved)
                self.groups[own] = self.groups[capture]
                return own
        return None


def _between(part: PartCall, known: _Captured) -> set[str]:
    """The attributes that keep a part from taking a capture over: asked for, and not the same there."""
    differing = part.differs_in(known.part)
    return differing if ALL in known.asked else differing & known.asked


def _moved(capture: Capture, model: nn.Module, old: str, new: str) -> Exported | None:
    """The capture with all paths in it moved; None if it reads anything besides the part.

    The graph may hold more of the model than the part's: what a part takes from outside, or what
    goes by another name, as tensors that several parts share do.
    """
    reads = capture.graph.graph.find_nodes(op="get_attr")
    names = {str(node.target) for node in reads if node.users}
    read = {name for name in names if not name.startswith(CONSTANT)}
    paths = read | capture.checkpointed
    if capture.aliased or not all(path.startswith(f"{old}.") for path in paths):
        return None
    if not {new + path.removeprefix(old) for path in read} <= _own_names(model):
        return None
    graph = copy_of(capture.graph)
    for node in list(graph.graph.nodes):
        _move(node, old, new)
    return Exported(
        graph=graph,
        out_spec=capture.out_spec,
        opening=capture.opening,
        checkpointed=frozenset(_path(path, old, new) for path in capture.checkpointed),
        guards=capture.guards,
        report=capture.report,
    )


def _own_names(model: nn.Module) -> set[str]:
    """The first path of every tensor and module, by which captures and banks know them."""
    named = (model.named_parameters(), model.named_buffers(), model.named_modules())
    return {path for found in named for path, _ in found if not in_bank(path)}


def _move(node: Node, old: str, new: str) -> None:
    if node.op == "get_attr" and not node.users:  # an export reads all of a model
        node.graph.erase_node(node)
        return
    if node.op == "get_attr":
        node.target = _path(str(node.target), old, new)
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {k: (_path(p, old, new), c) for k, (p, c) in stack.items()}


def _path(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else path
