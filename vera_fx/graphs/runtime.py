"""Finds the graph for a call: known key, known signature, or a new capture."""

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vera_fx._torch import any_global_hook
from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.bank.build import follow
from vera_fx.bank.hooks import EagerHook
from vera_fx.bank.slots import open_ranks
from vera_fx.base.hf import recording
from vera_fx.base.modules import ADAPTED, PART, is_extended, original_class
from vera_fx.base.positions import too_long
from vera_fx.base.sharding import has_parallel, is_sharded, refuse_flattened, spread_reason
from vera_fx.caching.captures import captured
from vera_fx.capturing.budget import Opening
from vera_fx.capturing.export_call import Capture
from vera_fx.capturing.signature import Call, CallReader
from vera_fx.capturing.state_watch import StateWatch, modules_at
from vera_fx.errors import AdapterError, CaptureError, PassError, TargetError, first_line
from vera_fx.graphs.advice import advise
from vera_fx.graphs.choose_graph import adapted, mixed, refuse_transforms
from vera_fx.graphs.kept import Kept, Ready
from vera_fx.graphs.machine import surroundings
from vera_fx.graphs.parts import Parts, entry_forward, split
from vera_fx.mixing.mixer import Mix
from vera_fx.processes.reduced import Reduced
from vera_fx.products.kinds import is_odd, place_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator


_UNKNOWN: Any = object()
_NONE = -1


class Runtime:
    """All captured and adapted graphs of one model; never part of its state.

    Attributes:
        kept: its captures, and the graphs of known calls.
        entries: runtimes for calls of parts of the model, by path.
        parts: what of the model runs in Python; the same for all entries.
        reduced: which parameters a wrapper around the model reduces; the same for all entries.
    """

    def __init__(self, model: nn.Module, entry: str = "", whole: "Runtime | None" = None) -> None:
        """Args: the model; the path of a part; and the runtime of the model, for that of a part."""
        open_ranks(self, "served")
        self._asked: set[str] = set()
        bound, self._forward = entry_forward(model, entry, self._asked)
        self.reader = CallReader(bound)
        self._entry, self.parts = entry, whole.parts if whole else Parts()
        self._whole = whole
        of_all = whole.watch if whole else None
        self._watch = StateWatch(modules_at(model, entry), EagerHook, of_all)
        self.reduced = whole.reduced if whole else Reduced()
        self.entries: dict[str, Runtime] = {}
        self.kept = Kept()
        self._followed = _NONE
        self._lock = threading.RLock()

    @property
    def watch(self) -> StateWatch:
        """Of what a graph may depend on: the part's own, if its code knows of no module outside of it.

        A call of each part that looked through the whole model would cost the square of its layers.
        """
        if self._whole is None or not self._watch.outside:
            return self._watch
        return self._whole.watch

    def refresh(self) -> None:
        """Take everything for changed that a graph may depend on."""
        self._watch.refresh()
        for entry in self.entries.values():
            entry.refresh()

    def all_captures(self) -> "Iterator[Capture]":
        """Every capture, those of calls of parts of the model included."""
        yield from self.kept.all()
        for entry in self.entries.values():
            yield from entry.all_captures()

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        # Graphs belong to one model object; a copy of the model captures its own.
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def ready(
        self, model: nn.Module, call: Call, mix: Mix | None = None
    ) -> tuple[Ready | None, int | None]:
        """The graph for ``call``, captured and adapted if it is new; None if it runs in Python.

        Args:
            model: the adapted model.
            call: the call.
            mix: the adapters of its rows; None for the active adapters.

        Returns:
            The graph; and how often the slots that it reads had been switched then, if it reads some.

        Raises:
            CaptureError: a mixture's call cannot be captured.
            TargetError: a target is used in a way that cannot be adapted.
            LengthError: it cannot be captured, and has more tokens than the model has positions for.
        """
        state = self._follow(model)
        if self._is_hooked(model, mixed=mix is not None):
            return None, None
        structure, switches = _structure(model, mix)
        key = (call.key, state, structure, surroundings(), torch.is_grad_enabled())
        found = self.kept.get(key, _UNKNOWN)
        if found is not _UNKNOWN:
            return found, switches
        with self._lock:
            found, made = self._resolve(model, call, mix, key)
            if made in {switches, None}:  # else another thread has switched meanwhile
                # The state is read again: tracing runs the model's code, which may change it.
                self.kept.put((call.key, self.watch.state(), *key[2:]), found)
        return found, made

    def _follow(self, model: nn.Module) -> int:
        """The number of the model's state, which the bank knows as well."""
        watch = self.watch
        state = watch.state()
        if watch is not self.watch:  # the code of the part has come to know of others
            state = self.watch.state()
        if state != self._followed:
            refuse_flattened(model)
            # Nothing was watched before the first call: a parallel style may have come after adapt.
            if self._followed != _NONE or has_parallel(model):
                follow(model, bank_of(model))
            self._followed = state
        return state

    def _is_hooked(self, model: nn.Module, *, mixed: bool) -> bool:
        """True if modules below the entry have hooks, which only run where Python calls modules.

        Raises:
            CaptureError: the call mixes adapters, which only graphs can do.
        """
        noting = self._noting() if self.watch.recorders else []
        if not (self.watch.hooked or noting or self.parts.hooked or any_global_hook()):
            return False
        prefix = f"{self._entry}." if self._entry else ""
        inside = [
            p
            for p in (*self.watch.hooked, *noting)
            if p and p.startswith(prefix) and p != self._entry
        ]
        if not inside and not any_global_hook():
            self.parts.forget_hooks(self._entry)
            return False
        users = [path for path in inside if not _is_spread(model.get_submodule(path))]
        sharded = bool(inside) and not users
        where = f"{users[0]!r}" if users else "all modules"
        reason = (
            spread_reason(model)
            if sharded
            else f"a hook is registered on {where}, and graphs call no modules; remove it to run one"
        )
        if mixed:
            raise CaptureError(f"adapter_names needs the call as one graph, but {reason}")
        split(model, self.parts, self._entry, reason, hooks=True, quiet=sharded)
        return True

    def _noting(self) -> list[str]:
        """Paths of modules whose outputs transformers notes in this very call."""
        now = recording()
        recorders = self.watch.recorders.items()
        return [path for path, names in recorders if any(name in now for name in names)]

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call, taken apart; None if something in it cannot be passed to a graph."""
        try:
            return self.reader.read(args, kwargs)
        except CaptureError as error:
            split(model, self.parts, self._entry, first_line(error))
            return None

    def _resolve(
        self, model: nn.Module, call: Call, mix: Mix | None, key: "Hashable"
    ) -> tuple[Ready | None, int | None]:
        self.kept.check(key)
        try:
            for capture in reversed(self.kept.captures.get(self._signature(call), [])):
                if capture.guards.admit(call.leaves):
                    return _ready(model, capture, call, mix)
            return self._captured(model, call, mix)
        except CaptureError as error:
            if (longer := too_long(model, call.arguments)) is not None:
                raise longer from error
            # Without values a module cannot run in Python either.
            if mix is not None or _is_empty(model):
                raise
            split(model, self.parts, self._entry, first_line(error))
            return None, None
        except TargetError as error:
            self.kept.refuse(key, error)
            raise

    def _captured(self, model: nn.Module, call: Call, mix: Mix | None) -> tuple[Ready, int | None]:
        opening = self.kept.opening(call.structure())
        capture = self._capture(model, call, opening)
        if not capture.guards.admit(call.leaves):
            raise PassError(
                f"the graph captured from this call of {type(model).__name__} does not admit the "
                "call's own sizes; this is a fault of vera_fx, please report it with the model"
            )
        refuse_transforms(model, capture)
        ready = _ready(model, capture, call, mix)
        signature, before = self._signature(call), next(reversed(self.kept.captures), None)
        self.kept.add(signature, capture)
        advise(type(model).__name__, self.kept.made, signature[0], before[0] if before else None)
        return ready

    def _capture(self, model: nn.Module, call: Call, opening: Opening) -> Capture:
        if not self._entry:
            return captured(model, (self._forward, self.reader), call, opening, surroundings())
        entry = (self._entry, self._forward, self.reader, self._asked)
        return self.parts.equal.captured(model, entry, call, opening, surroundings())

    def _signature(self, call: Call) -> tuple[Any, ...]:
        return (call.structure(), self.watch.state(), surroundings())


def _is_spread(module: nn.Module) -> bool:
    """True for a module whose hooks are how it works with other processes."""
    return is_sharded(module) or is_odd(module)


def _is_empty(model: nn.Module) -> bool:
    """True if some target has no values."""
    paths = bank_of(model).structure.targets
    return any(place_of(model, path)[1].type == "meta" for path in paths)


def _structure(model: nn.Module, mix: Mix | None) -> "tuple[Hashable, int | None]":
    """What of the adapters decides which graph fits; and how often slots were switched until now."""
    if mix is not None:
        return (mix.mixer.structure, mix.dropout), None
    slots = bank_of(model).slots
    slots.follow()
    with slots.lock:
        binding = slots.binding
        return (binding.structure, binding.dropout, slots.work), slots.switches


def _ready(
    model: nn.Module, capture: Capture, call: Call, mix: Mix | None
) -> tuple[Ready, int | None]:
    if mix is not None:
        variant, graph = mixed(model, capture, call, mix)
        return Ready(graph, capture, variant.refused), None
    slots = bank_of(model).slots
    with slots.lock:  # a switch would give one structure's key to another's graph
        return Ready(adapted(model, capture, call), capture), slots.switches


def require_adapted(model: nn.Module) -> AdapterBank:
    """The model's bank.

    Raises:
        AdapterError: the model is not adapted.
    """
    if is_extended(model, PART):
        raise AdapterError(
            f"this {original_class(model).__name__} is a part of an adapted model, which runs in Python and "
            "calls it; give the adapted model itself, whose report names its parts"
        )
    if not is_extended(model, ADAPTED):
        raise AdapterError(
            f"this {type(model).__name__} is not adapted; call vera_fx.adapt(model, config) first"
        )
    return bank_of(model)


def runtime_of(model: nn.Module) -> Runtime:
    """The model's runtime; made anew for a model that was copied or unpickled."""
    runtime = model.__dict__.get("_vera_runtime")
    if runtime is None:  # a copy's is None; another thread may make one as well, and one is used
        with bank_of(model).slots.lock:
            runtime = model.__dict__.get("_vera_runtime")
            if runtime is None:
                runtime = model.__dict__["_vera_runtime"] = Runtime(model)
    return runtime
