"""Finds the graph for a call: known key, known signature, or a new capture.

Everything here runs in plain Python outside of Dynamo. What torch.compile compiles is the graph
that `prepare` returns, one code object per signature, so that signatures never compete for one
compile cache.
"""

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from vera_fx._torch import outside_dynamo
from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.bank.hooks import EagerHook
from vera_fx.bank.slots import open_ranks
from vera_fx.base.modules import in_bank
from vera_fx.capturing.export_call import Capture, capture_call, original_class
from vera_fx.capturing.returned_objects import restore
from vera_fx.capturing.signature import Call, CallReader
from vera_fx.capturing.state_watch import StateWatch
from vera_fx.errors import AdapterError, CaptureError, first_line
from vera_fx.graphs.advice import advise
from vera_fx.graphs.choose_graph import adapted, mixed
from vera_fx.graphs.machine import autocast_state
from vera_fx.graphs.parts import Parts, split
from vera_fx.mixing.check import mix_of
from vera_fx.mixing.kept_mix import mix_again
from vera_fx.mixing.kept_names import held_by
from vera_fx.mixing.mixer import Mix
from vera_fx.mixing.rows_of_call import row_names
from vera_fx.products.kinds import place_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping


_UNKNOWN: Any = object()


@dataclass(slots=True)
class Ready:
    """A graph that fits one exact call, with what it takes to rebuild the call's result."""

    graph: GraphModule
    capture: Capture
    refused: "Mapping[str, str]" = field(default_factory=dict[str, str])


@dataclass(slots=True)
class Prepared:
    """A call, taken apart, and what it is to run."""

    graph: GraphModule
    capture: Capture
    call: Call


class Runtime:
    """All captured and adapted graphs of one model; never part of its state.

    Attributes:
        captures: the captures of each signature, newest last.
        entries: runtimes for calls of parts of the model, by path.
        parts: what of the model runs in Python; the same for all entries.
    """

    memo_limit = 4096

    def __init__(self, model: nn.Module, entry: str = "", parts: Parts | None = None) -> None:
        open_ranks(self, "served")
        self.reader = CallReader(_entry_forward(model, entry)[0])
        self._forward = _entry_forward(model, entry)[1]
        self._entry, self.parts = entry, parts or Parts()
        modules = [m for path, m in model.named_modules() if not in_bank(path)]
        self.watch = StateWatch(modules, EagerHook)
        self.entries: dict[str, Runtime] = {}
        self.captures: dict[tuple[Any, ...], list[Capture]] = {}
        self._memo: dict[Hashable, Ready | None] = {}
        self._lock = threading.RLock()

    def all_captures(self) -> "Iterator[Capture]":
        """Every capture, those of calls of parts of the model included."""
        for found in self.captures.values():
            yield from found
        for entry in self.entries.values():
            yield from entry.all_captures()

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        # Graphs belong to one model object; a copy of the model captures its own.
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def ready(self, model: nn.Module, call: Call, mix: Mix | None = None) -> Ready | None:
        """The graph for ``call``, captured and adapted if it is new; None if it runs in Python.

        Args:
            model: the adapted model.
            call: the call.
            mix: the adapters of its rows; None for the active adapters.

        Raises:
            CaptureError: a mixture's call cannot be captured.
            TargetError: a target is used in a way that cannot be adapted.
        """
        if mix is None:
            bank = bank_of(model)
            bank.slots.follow()
            binding = bank.slots.binding
            structure: Hashable = (binding.structure, binding.dropout, bank.slots.work)
        else:
            structure = mix.mixer.structure, mix.dropout
        key = (call.key, self.watch.state(), structure, autocast_state(), torch.is_grad_enabled())
        found = self._memo.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            with self._lock:
                found = self._resolve(model, call, mix)
                if len(self._memo) >= self.memo_limit:
                    self._memo.clear()
                # The state is read again: tracing runs the model's code, which may change it.
                self._memo[call.key, self.watch.state(), *key[2:]] = found
        return found

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call, taken apart; None if something in it cannot be passed to a graph."""
        try:
            return self.reader.read(args, kwargs)
        except CaptureError as error:
            split(model, self.parts, self._entry, first_line(error))
            return None

    def _resolve(self, model: nn.Module, call: Call, mix: Mix | None) -> Ready | None:
        signature = (call.structure(), self.watch.state(), autocast_state())
        for capture in reversed(self.captures.get(signature, [])):
            if capture.guards.admit(call.leaves):
                return _ready(model, capture, call, mix)
        try:
            capture = capture_call(model, self._forward, self.reader, call)
        except CaptureError as error:
            # Without values a module cannot run in Python either.
            if mix is not None or any(
                place_of(model, p)[1].type == "meta" for p in bank_of(model).structure.targets
            ):
                raise
            split(model, self.parts, self._entry, first_line(error))
            return None
        if not capture.guards.admit(call.leaves):
            raise CaptureError(
                f"the graph captured from this call of {type(model).__name__} does not admit the "
                "call's own sizes; this is a fault of vera_fx, please report it with the model"
            )
        ready = _ready(model, capture, call, mix)
        signature = (call.structure(), self.watch.state(), autocast_state())
        before = next(reversed(self.captures), None)
        self.captures.setdefault(signature, []).append(capture)
        count = sum(map(len, self.captures.values()))
        advise(type(model).__name__, count, signature[0], before[0] if before else None)
        return ready


def _ready(model: nn.Module, capture: Capture, call: Call, mix: Mix | None) -> Ready:
    if mix is None:
        return Ready(adapted(model, capture, call), capture)
    variant = mixed(model, capture, call, mix)
    return Ready(variant.graph, capture, variant.refused)


def _entry_forward(model: nn.Module, entry: str) -> tuple[Any, Any]:
    """The forward of a part of the model: bound, to read its signature; and as one of the model."""
    if not entry:
        forward = original_class(model).forward
        return forward.__get__(model), forward

    def run(shell: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return shell.get_submodule(entry)(*args, **kwargs)

    return model.get_submodule(entry).forward, run


def require_adapted(model: nn.Module) -> AdapterBank:
    """The model's bank.

    Raises:
        AdapterError: the model is not adapted.
    """
    if not hasattr(type(model), "_vera_base"):
        hint = "you passed the compiled wrapper; pass the model that was given to torch.compile"
        raise AdapterError(
            f"this {type(model).__name__} is not adapted; "
            + (hint if hasattr(model, "_orig_mod") else "call vera_fx.adapt(model, config) first")
        )
    return bank_of(model)


def runtime_of(model: nn.Module) -> Runtime:
    """The model's runtime; made anew for a model that was copied or unpickled."""
    runtime = model.__dict__.get("_vera_runtime")
    if runtime is None:
        runtime = model.__dict__["_vera_runtime"] = Runtime(model)
    return runtime


@outside_dynamo
def prepare(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], entry: str = ""
) -> Prepared | None:
    """Take the call apart and find its graph; None if its forward is to run in Python.

    Args:
        model: the adapted model.
        args: positional arguments.
        kwargs: keyword arguments; ``adapter_names`` gives every row its adapter.
        entry: path of the part of the model that is called; nothing for the model itself.
    """
    runtime = runtime_of(model)
    if entry:
        runtime = runtime.entries.get(entry) or runtime.entries.setdefault(
            entry, Runtime(model, entry, runtime.parts)
        )
    names = kwargs.pop("adapter_names", None)
    call = runtime.read(model, args, kwargs)
    if call is None:
        _refuse_names(model, names)
        return None
    mix = _mix_for(model, call, names)
    ready = runtime.ready(model, call, mix)
    if mix is not None and ready is not None:
        if ready.refused:
            mix.check(ready.refused)
        call.leaves += mix.tensors
    return None if ready is None else Prepared(ready.graph, ready.capture, call)


def _refuse_names(model: nn.Module, names: Any) -> None:
    if names is not None or held_by(bank_of(model)) is not None:
        raise CaptureError(
            "adapter_names needs the call as one graph, and an argument is neither a tensor nor a "
            "constant nor a tree of them; call the model once per adapter (set_adapter)"
        )


def _mix_for(model: nn.Module, call: Call, names: Any) -> Mix | None:
    """The mixture of a call: of its own ``adapter_names``, or of the ``generate`` around it."""
    if names is not None:
        return mix_of(model, names)
    held = held_by(bank_of(model))
    return held and mix_again(model, row_names(call, held.names), held)


@outside_dynamo
def finish(prepared: Prepared, outputs: list[Tensor]) -> Any:
    """Rebuild the result of a call from the graph's flat outputs."""
    names = prepared.capture.stateful
    objects = {name: prepared.call.arguments[name] for name in names} if names else None
    return restore(list(outputs), prepared.capture.out_spec, objects)
