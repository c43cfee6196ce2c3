"""What graphs read of the computing adapters: made once for each set of them, and then kept.

Graphs never read an adapter directly. They read *slots*, plain holders outside of ``state_dict``,
one for each computing adapter. A switch puts other slots in place and touches no tensor, so that it
costs the same however large the model is.

Compiled code is made for tensors that require gradients, or for tensors that do not. So there are
slots of two kinds: with the adapters' own parameters, and, for calls without gradients, with the
same values under parameters that never require any. There one graph serves all adapters, whether
they train or not, with zeros and the base's tensors for what they lack.
"""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from vera_fx._context import open_dimensions
from vera_fx._torch import stamp
from vera_fx._torch_graphs import ordinary_input
from vera_fx.base.modules import BANK
from vera_fx.branches.kinds import KINDS

COPIED_BYTES = 64 * 2**20
"""The largest tensor that CUDA graphs copy in, rather than be recorded for its address."""


class Slot:
    """The tensors of one computing adapter under the names that graphs use."""

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        self.__dict__.update(values or {})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return self.__dict__

    def without_gradients(self, borrowed: Container[str] = ()) -> "Slot":
        """The same memory under tensors that require no gradients, and are nobody's but the slot's.

        Args:
            borrowed: names of tensors that are the base's own.
        """
        return Slot({n: _frozen(t, n in borrowed) for n, t in self.tensors().items()})

    def open_addresses(self, names: Iterable[str]) -> None:
        """Let CUDA graphs copy these in with every replay, so that none is recorded for a switch.

        All but large ones: two copies of a head for a vocabulary would cost a step more than one
        recording for each adapter costs once.
        """
        for name in names:
            if self.tensors()[name].nbytes <= COPIED_BYTES:
                ordinary_input(self.tensors()[name])


def _frozen(value: Tensor, borrowed: bool) -> Tensor:
    if not (value.requires_grad or borrowed):
        return value
    return nn.Parameter(value.detach(), requires_grad=False)


def slot_path(index: int, attribute: str) -> str:
    """The path under which graphs read an attribute of a slot."""
    return f"{BANK}.slot{index}.{attribute}"


def served_path(path: str) -> str:
    """The path under which calls without gradients read what `path` is, if it is of a slot."""
    return re.sub(rf"^{BANK}\.slot(?=\d+\.)", f"{BANK}.served", path)


def open_ranks(owner: object, kind: str) -> None:
    """Let one compiled graph serve adapters of every rank above 1.

    Args:
        owner: for as long as it lives.
        kind: ``"served"``, which costs nothing; or ``"slot"``, which costs some 3 % of a training
            step, for banks whose adapters do have different ranks.
    """
    sources: list[tuple[str, int]] = []
    for branch in KINDS:
        for name, dim in branch.open_with_rank().items():
            attribute = name if name in branch.parameters.shared else rf"\w+__{name}_*"
            sources.append((rf".*\b{BANK}\b.*\.{kind}\d+\.{attribute}$", dim))
            # Functions made of layers take the same tensors as arguments, named by what was read.
            argument = attribute.lower() + r"(_\d+)?"
            sources.append((rf"L\['{BANK}_{kind}\d+_{argument}'\]$", dim))
    open_dimensions(owner, dict.fromkeys(sources))


class SlotNames:
    """Names of tensors as attributes of a slot: identifiers, each for one tensor only."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    def of(self, path: str, name: str) -> str:
        """The attribute for tensor ``name`` of the module at ``path``."""
        if (path, name) not in self._names:
            attribute = f"{path}.{name}".replace(".", "__")
            if attribute[
                0
            ].isdigit():  # as in nn.Sequential; what is no identifier is not left open
                attribute = f"_{attribute}"
            while attribute in self._names.values():
                attribute += "_"
            self._names[path, name] = attribute
        return self._names[path, name]


@dataclass(frozen=True, slots=True)
class Work:
    """What of the computing adapters decides how they are best computed, though not what.

    Attributes:
        ranks: each adapter's rank.
        trains: whether some of their vectors may train.
        requests: the plans that they ask for.
    """

    ranks: tuple[int, ...] = ()
    trains: bool = False
    requests: tuple[str, ...] = ()


class Binding:
    """The slots of one set of computing adapters.

    Attributes:
        slots: one for each adapter, in order.
        served: the same for calls without gradients.
        structure: a number for what of the adapters shapes graphs; 0 if none computes. All else
            about them is data.
        dropout: each adapter's dropout, which shapes graphs of train mode only.
        names: of the adapters.
    """

    def __init__(
        self,
        slots: tuple[Slot, ...] = (),
        structure: int = 0,
        dropout: tuple[float, ...] = (),
        sources: tuple[dict[str, Any], ...] = (),
        names: tuple[str, ...] = (),
        borrowed: frozenset[str] = frozenset(),
    ) -> None:
        """Args: as the attributes; dictionaries of modules that were read; names of the base's own tensors."""
        self.slots, self.structure, self.dropout = slots, structure, dropout
        self.names = names
        self.served = tuple(slot.without_gradients(borrowed) for slot in slots)
        pairs = (
            (own, slot.tensors()[name])
            for slot_, slot in zip(slots, self.served, strict=True)
            for name, own in slot_.tensors().items()
        )
        self._aliased = [own for own, alias in pairs if own is not alias]
        self._memory = self._pointers()
        self._sources, self._version = sources, stamp(sources)
        self._tensors = self._held()

    def is_current(self) -> bool:
        """False once a module holds another tensor than it did, or a tensor other memory."""
        version = stamp(self._sources)
        if version != self._version:
            # FSDP2 puts shards in the place of parameters and back, the same ones every time.
            if not all(map(is_, self._held(), self._tensors)):
                return False
            self._version = version
        return torch.is_grad_enabled() or self._pointers() == self._memory

    def _held(self) -> list[Any]:
        return [tensor for source in self._sources for tensor in source.values()]

    def _pointers(self) -> list[int]:
        # Before every call without gradients: no Python code for each tensor.
        return list(map(Tensor.data_ptr, self._aliased))
