"""Entries: modules inside of an adapted model that others call past the model's own forward.

TRL puts a forward on the model's object that calls ``self.base_model``, and ``generate`` calls encoders:
no graph of the whole model serves such calls. These modules start a run themselves, with graphs of their
own. Called by the model's own forward, they do what they did.
"""

import functools
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from vera_fx._context import current_run, remember, set_run
from vera_fx._torch import in_transform, skip_frame, start_compiling, stop_compiling
from vera_fx.bank.bank import bank_of
from vera_fx.base.modules import ADAPTED, PART, is_extended
from vera_fx.graphs.around import finish, prepare, run
from vera_fx.graphs.parts import part_class
from vera_fx.model.python_run import PythonRun, watched

_NAMES = ("encoder", "decoder", "language_model")


def make_entries(model: nn.Module) -> None:
    """Let calls of the model's entries from outside of its own forward run graphs."""
    bank_of(model).__dict__["owner"] = weakref.ref(model)
    for path, module in _entries(model):
        start = functools.partial(_called, weakref.ref(model), path)
        remember(module, start=start)
        if not is_extended(module, PART):
            module.__class__ = part_class(type(module))


def _entries(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What transformers calls the base model, and encoders and decoders in it or beside it."""
    prefix = getattr(model, "base_model_prefix", "")
    base = model._modules.get(prefix) if isinstance(prefix, str) else None
    if base is not None:
        yield prefix, base
    for holder, start in ((model, ""), (base, f"{prefix}.")):
        for name in _NAMES:
            found = None if holder is None else holder._modules.get(name)
            if found is not None and _has_forward(found):
                yield start + name, found


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)


@skip_frame
def _called(
    owner: "weakref.ref[nn.Module]",
    path: str,
    part: nn.Module,
    base: type[nn.Module],
    call: tuple[tuple[Any, ...], dict[str, Any]],
) -> Any:
    """Run an entry's graph, or its forward if it cannot be captured."""
    model, (args, kwargs) = owner(), call
    if model is None or not is_extended(model, ADAPTED) or in_transform() or _is_plain(model, path):
        return base.forward(part, *args, **kwargs)
    prepared = prepare(model, args, dict(kwargs), path)
    if prepared is not None:
        return finish(prepared, run(prepared))
    return _in_python(model, part, base, call)


def _is_plain(model: nn.Module, path: str) -> bool:
    """True if no target is inside of the entry, or none computes."""
    bank = bank_of(model)
    inside = f"{path}."
    return not bank.computing() or not any(p.startswith(inside) for p in bank.structure.targets)


@skip_frame
def _in_python(
    model: nn.Module,
    part: nn.Module,
    base: type[nn.Module],
    call: tuple[tuple[Any, ...], dict[str, Any]],
) -> Any:
    compiler, before = stop_compiling(), current_run()
    try:
        set_run(PythonRun(model, compiler))
        with watched(model):
            return base.forward(part, *call[0], **call[1])
    finally:
        set_run(before)
        start_compiling(compiler)
