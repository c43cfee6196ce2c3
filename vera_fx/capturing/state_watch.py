"""Notices that a model's Python state changed, so that no stale graph ever runs.

A captured graph bakes in what its Python code read: train or eval mode, dropout rates, flags,
submodules, methods, globals, dtypes and devices of the weights. The watch gives every such state a
small number, which is part of the key under which graphs are kept: a changed state leads to another
capture, a restored one back to its graph.
"""

import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from operator import attrgetter, is_
from types import CellType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vera_fx._torch import TensorMarks, stamp
from vera_fx._torch_parallel import hook_parts
from vera_fx.base.hf import recorded_by
from vera_fx.base.marks import Marks
from vera_fx.base.modules import asks_for_gradients, in_bank, original_class
from vera_fx.base.swaps import Stamped, Swaps
from vera_fx.capturing.facts import fact, slot_value
from vera_fx.capturing.reads import Reads, reads_of
from vera_fx.products.kinds import is_odd

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KEPT = 1024
"""States that have a number; the one that was not used for longest loses it."""


class StateWatch:
    """Numbers the states of all that the forward of a model may read.

    Attributes:
        hooked: paths of modules with hooks that are not the library's, or other ways of being parallel
            than graphs know, in order.
        recorders: paths of modules whose outputs hooks of transformers note, and under which names.
        outside: whether code of a part's modules may read others of the model, which are not watched.
    """

    def __init__(
        self,
        modules: Callable[[], Iterable[tuple[str, nn.Module]]],
        ignored_hook: type,
        whole: "StateWatch | None" = None,
    ) -> None:
        """Args: gives the modules by path as they are now; and the class of the library's hooks.

        The watch of the whole model, for one of a part: no state of one has a number of the other's.
        """
        self._find, self._ignored_hook = modules, ignored_hook
        self.hooked: tuple[str, ...] = ()
        self.recorders: dict[str, set[str]] = {}
        self.outside, self._whole = False, whole
        self._states: dict[Hashable, int] = {}
        self._numbers: dict[Hashable, int] = {}
        self._count: Iterator[int] = whole._count if whole else itertools.count()
        self._current = -1
        self._swaps = Swaps()
        self._lock = threading.RLock()  # marks and number change together
        self._look()

    def state(self) -> int:
        """The number of the present state; cheap while nothing changes."""
        with self._lock:
            if not self._hooks_unchanged():
                self._look_for_hooks()
            if not (self._unchanged() or self._swapped()):
                self._look()
            return self._current

    def refresh(self) -> None:
        """Take everything for changed: for changes that leave no mark."""
        with self._lock:
            self._states.clear()
            self._swaps.forget()
            self._look()

    def _hooks_unchanged(self) -> bool:
        # Hooks on tensors, as FSDP2 sets some in every call, take numbers of the same counter.
        if self._handles != RemovableHandle.next_id:
            if not self._all_hooks.hold():
                return False
            self._handles = RemovableHandle.next_id
        return not self.hooked or stamp(self._hook_dicts) == self._hook_stamp

    def _unchanged(self) -> bool:
        return self._parameters.hold() and self._rest_unchanged()

    def _swapped(self) -> bool:
        """True if parameters were swapped for others that were in place before, and nothing else."""
        if not self._rest_unchanged():
            self._swaps.forget()
            return False
        found = self._swaps.number()
        if found is None:
            return False
        self._parameters, self._current = self._swaps.mark(), found
        return True

    def _rest_unchanged(self) -> bool:
        return (
            self._marks.hold()
            and self._tensors.hold()
            and all(map(_holds, self._lists, self._entries))
            and all(map(is_, map(_content, self._cells), self._contents))
            and all(slot_value(value, slot) is held for value, slot, held in self._slotted)
        )

    def _look(self) -> None:
        """Find anew what may be read, and number its state."""
        named = dict(self._find())
        reads = reads_of(named.values())
        self._take(reads)
        if reads.others and self._whole is not None:
            self.outside = reads.reach(module for _, module in self._whole._find())
        facts = tuple(map(self._numbered, self._facts(reads)))
        number = self._states.pop(facts, None)
        self._states[facts] = next(self._count) if number is None else number
        self._current = self._states[facts]
        if len(self._states) > _KEPT:
            del self._states[next(iter(self._states))]
        self._named = named
        self._swaps.note(named.values(), self._current)
        self._look_for_hooks()

    def _take(self, reads: Reads) -> None:
        swapped = {id(module._parameters) for module in reads.modules}
        where = [reader.where for reader in reads.readers]
        others = (held for held in where if id(held) not in swapped)
        self._marks = Marks(others, reads.empties, reads.modules, reads.owners)
        self._parameters: Marks | Stamped = Marks(held for held in where if id(held) in swapped)
        self._tensors = TensorMarks(reads.first)
        self._lists, self._entries = reads.lists, [tuple(values) for values in reads.lists]
        self._cells = [cell for cell in reads.cells if _is_set(cell)]
        self._contents = list(map(_content, self._cells))
        self._slotted = [(v, slot, slot_value(v, slot)) for v, slot in reads.slotted]

    def _facts(self, reads: Reads) -> Iterable[Hashable]:
        yield tuple((fact(module), fact(original_class(module))) for module in reads.modules)
        yield tuple((t.dtype, t.device, t.shape, t.requires_grad) for t in reads.tensors)
        yield from (reader.facts() for reader in reads.readers)
        yield from (fact(values) for values in reads.lists)
        yield tuple(map(fact, self._contents))
        yield tuple((slot.__name__, fact(held)) for _, slot, held in self._slotted)

    def _numbered(self, facts: Hashable) -> int:
        """A small number for the facts of one source, so that states compare quickly."""
        if len(self._numbers) > _KEPT * 64:
            self._numbers.clear()
            self._states.clear()
        return self._numbers.setdefault(facts, next(self._count))

    def _look_for_hooks(self) -> None:
        self._handles = RemovableHandle.next_id
        every = {path: [m.__dict__[name] for name in _HOOKS] for path, m in self._named.items()}
        self._all_hooks = Marks(hooks for dicts in every.values() for hooks in dicts)
        found = {path: list(filter(self._has_foreign, dicts)) for path, dicts in every.items()}
        noted = ((path, set(self._recorded(module))) for path, module in self._named.items())
        self.recorders = {path: names for path, names in noted if names}
        odd = {path for path, module in self._named.items() if is_odd(module)}
        self.hooked = tuple(path for path, dicts in found.items() if dicts or path in odd)
        self._hook_dicts = [hooks for dicts in found.values() for hooks in dicts]
        self._hook_stamp = stamp(self._hook_dicts)

    def _has_foreign(self, hooks: dict[int, Any]) -> bool:
        """True if there are hooks in it that have to run where Python calls modules."""
        return any(map(self._has_to_run, hooks.values()))

    def _has_to_run(self, hook: Any) -> bool:
        # Graphs do what hooks of tensor parallelism do, unless their module is odd.
        ours = isinstance(hook, self._ignored_hook) or bool(hook_parts(hook))
        return not ours and not asks_for_gradients(hook) and recorded_by(hook) is None

    def _recorded(self, module: nn.Module) -> Iterable[str]:
        names = map(recorded_by, module._forward_hooks.values())
        return (name for name in names if name is not None)


_content = attrgetter("cell_contents")


def _is_set(cell: CellType) -> bool:
    try:
        _content(cell)
    except ValueError:
        return False
    return True


def _holds(values: Any, entries: tuple[Any, ...]) -> bool:
    """True if a container has the very entries that it had."""
    return len(values) == len(entries) and all(map(is_, values, entries))


def modules_at(model: nn.Module, entry: str) -> Callable[[], list[tuple[str, nn.Module]]]:
    """Gives the modules at and below a path, as they are when it is called; without the bank's."""

    def now() -> list[tuple[str, nn.Module]]:
        found = model.get_submodule(entry).named_modules(prefix=entry)
        return [(path, module) for path, module in found if not in_bank(path)]

    return now
