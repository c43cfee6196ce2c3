"""Parameters that come and go with every call: FSDP2 puts gathered ones in the place of shards, and back.

To a watch of a model's state each of these swaps is a change. The same tensors in the same places are a
state that was numbered before, and need no look at everything else.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from vera_fx._torch import stamp
from vera_fx.base.sharding import is_sharded

_KEPT = 512


class Stamped:
    """Notices that some dictionary has changed since this was made; quickly made."""

    def __init__(self, dicts: list[dict[Any, Any]]) -> None:
        self._dicts, self._stamp = dicts, stamp(dicts)

    def hold(self) -> bool:
        """True while all are what they were."""
        return stamp(self._dicts) == self._stamp


class Swaps:
    """The numbers of states that differ in nothing but which tensors are in place.

    Nothing is kept of a model that is not sharded: its old parameters may go.
    """

    def __init__(self) -> None:
        self._dicts: list[dict[str, Any]] = []
        self._known: dict[tuple[int, ...], tuple[int, list[Any]]] = {}

    def note(self, modules: Iterable[nn.Module], number: int) -> None:
        """Note the number of the present state."""
        modules = list(modules)
        if not any(map(is_sharded, modules)):
            return self.forget()
        self._dicts = [module._parameters for module in modules if module._parameters]
        if len(self._known) >= _KEPT:
            self._known.clear()
        held = self._held()
        self._known[tuple(map(id, held))] = number, held  # identities stay theirs
        return None

    def forget(self) -> None:
        """Forget all of them: something else has changed."""
        self._dicts = []
        self._known.clear()

    def number(self) -> int | None:
        """The number of the state with the tensors that are in place now, if it is known."""
        found = self._known.get(tuple(map(id, self._held()))) if self._known else None
        return None if found is None else found[0]

    def mark(self) -> Stamped:
        """Marks of where the tensors are."""
        return Stamped(self._dicts)

    def _held(self) -> list[Any]:
        return [tensor for held in self._dicts for tensor in held.values()]
