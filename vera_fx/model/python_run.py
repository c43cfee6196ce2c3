"""Runs the forward of a model that cannot be captured whole; its parts run their graphs."""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vera_fx._context import current_run, remember, set_run
from vera_fx._torch import compiled_by, skip_frame, start_compiling, stop_compiling
from vera_fx.bank.bank import bank_of
from vera_fx.base.modules import ADAPTED, is_extended
from vera_fx.base.sharding import is_sharded
from vera_fx.graphs.around import Prepared, finish, prepare, run
from vera_fx.graphs.runtime import runtime_of
from vera_fx.graphs.weight_watch import WeightWatch, unwatched


class PythonRun:
    """One call of ``model``. What torch.compile compiles are the parts' graphs.

    Args:
        model: the adapted model.
        compiler: torch.compile's hook on frames; None where nothing is compiled.
    """

    def __init__(self, model: nn.Module, compiler: Any) -> None:
        self._model, self._compiler = model, compiler
        self._parts = runtime_of(model).parts
        self._looked_at: tuple[Any, int] = (None, 0)

    @skip_frame
    def call(
        self, part: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the part's graph, or its forward if it cannot be captured either."""
        path = self._parts.paths.get(id(part))
        if path is None:  # of another model
            return base.forward(part, *args, **kwargs)
        remember(part, run=functools.partial(_again, weakref.ref(self._model)))
        own = stop_compiling()  # of a part that is compiled by itself, in a model that is not
        try:
            with unwatched():
                inside = self._same_adapters()
                prepared = prepare(self._model, args, dict(kwargs), path, inside=inside)
                if prepared is not None:
                    return finish(prepared, self._run(prepared, own or self._compiler))
        finally:
            start_compiling(own)
        # Before its parameters were gathered the watch around the model knew none of them.
        with watched(self._model, path) if is_sharded(part) else contextlib.nullcontext():
            return base.forward(part, *args, **kwargs)

    def _same_adapters(self) -> bool:
        """True if what trains was looked at in this call of the model, and nothing was switched since."""
        slots, (binding, switches) = bank_of(self._model).slots, self._looked_at
        self._looked_at = slots.binding, slots.switches
        return binding is slots.binding and switches == slots.switches

    def _run(self, prepared: Prepared, compiler: Any) -> list[Tensor]:
        if compiler:
            prepared.graph = self._parts.bodies.call_of(prepared.graph)
        with compiled_by(compiler):
            return run(prepared)


def _again(model: "weakref.ref[nn.Module]") -> PythonRun | None:
    """A run after the call has ended: in a backward, where nothing is compiled anew."""
    owner = model()
    if owner is None or not is_extended(owner, ADAPTED):
        return None
    return PythonRun(owner, None)


@skip_frame
def run_in_python(
    model: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the model's own forward.

    Raises:
        TargetError: it uses a tensor of a target itself, where no branch would be added.
    """
    compiler = stop_compiling()
    before = current_run()
    try:
        set_run(PythonRun(model, compiler))
        with watched(model):
            return forward(model, *args, **kwargs)
    finally:
        set_run(before)
        start_compiling(compiler)


def watched(model: nn.Module, inside: str = "") -> contextlib.AbstractContextManager[Any]:
    """Inside the block tensors of the targets that compute may be used by their modules only.

    Args:
        model: the adapted model.
        inside: the path of a module; of targets elsewhere nothing is looked at.
    """
    bank = bank_of(model)
    watch = WeightWatch(model, bank, inside) if bank.computing() else None
    return watch or contextlib.nullcontext()
