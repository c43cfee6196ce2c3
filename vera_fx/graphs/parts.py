"""Parts of a model that cannot be captured whole: modules that run graphs of their own.

A forward whose control flow depends on tensor values cannot become one graph. It then runs in
Python (`vera_fx.model.python_run`), and the modules that it calls with targets inside become parts: each
runs a graph of its own, or runs in Python in turn.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vera_fx._context import (
    class_made_of,
    current_run,
    is_capturing,
    remembered,
    traced_by_others,
)
from vera_fx._torch import break_trace, in_backward, skip_frame
from vera_fx.bank.bank import AdapterBank, adapted_paths, bank_of
from vera_fx.bank.hooks import Entering
from vera_fx.base.modules import PART, base_modules, extended_class, is_extended, original_class
from vera_fx.caching.attribute_reads import attribute_reads_noted
from vera_fx.caching.equal_parts import EqualParts
from vera_fx.caching.shared_bodies import SharedBodies
from vera_fx.errors import PartialCaptureWarning, listing


@dataclass(slots=True)
class Parts:
    """What of a model runs in Python, and which of its modules run graphs of their own.

    Attributes:
        paths: the parts' paths, by the modules' identity.
        reasons: for each path that runs in Python, why it is not captured.
        hooked: those of them that run in Python for as long as hooks are registered.
        equal: the captures that parts share.
        bodies: what of their graphs is compiled once.
    """

    paths: dict[int, str] = field(default_factory=dict[int, str])
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    hooked: set[str] = field(default_factory=set[str])
    equal: EqualParts = field(default_factory=EqualParts)
    bodies: SharedBodies = field(default_factory=SharedBodies)

    def forget_hooks(self, path: str) -> None:
        """The hooks that kept ``path`` from being captured are gone."""
        if path in self.hooked:
            self.hooked.remove(path)
            del self.reasons[path]


def part_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a part that was a ``base``, under the same name.

    Outside of a run it does what it did before.
    """
    return class_made_of(base, PART, _part_of)


def _part_of(base: type[nn.Module]) -> type[nn.Module]:
    return extended_class(base, PART, {"forward": _forward_for(base), "__reduce_ex__": _reduce})


def _reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:
    # Copies belong to other models, which make parts of them when they need to.
    return object.__new__, (original_class(self),), self.__getstate__()


def _forward_for(base: type[nn.Module]) -> Callable[..., Any]:
    @skip_frame
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is None and in_backward():
            # A checkpoint computes the part once more, and wants the tensors that its graph kept.
            again = remembered(self, "run")
            run = None if again is None else again()
        if is_capturing() or traced_by_others():
            return base.forward(self, *args, **kwargs)
        if run is not None:
            break_trace()
            return run.call(self, base, args, kwargs)
        start = remembered(self, "start")
        return (
            base.forward(self, *args, **kwargs)
            if start is None
            else start(self, base, (args, kwargs))
        )

    return forward


def split(
    model: nn.Module,
    parts: Parts,
    entry: str,
    reason: str,
    *,
    hooks: bool = False,
    quiet: bool = False,
) -> None:
    """Note that the module at ``entry`` runs in Python, and make parts of what it calls.

    Warns:
        PartialCaptureWarning: once for each path, if not ``quiet``: where it is as it should be.
    """
    if entry in parts.reasons:
        return
    parts.reasons[entry] = reason
    if hooks:
        parts.hooked.add(entry)
    found = dict(_parts_below(model, bank_of(model), entry))
    for path, module in found.items():
        parts.paths[id(module)] = path
        if not is_extended(module, PART):
            module.__class__ = part_class(type(module))
    _note_entries(model, bank_of(model))
    if quiet:
        return
    name = f"{entry!r} in {type(model).__name__}" if entry else type(model).__name__
    warnings.warn(
        f"{name} cannot be captured whole and runs in Python: {reason}\n"
        f"  Parts with graphs of their own: {listing(found, limit=4)}. Other targets are adapted "
        "eagerly, as PEFT does.",
        PartialCaptureWarning,
        stacklevel=2,
    )


def _parts_below(
    model: nn.Module, bank: AdapterBank, entry: str
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules below ``entry`` that have a forward and hold adapted modules."""
    adapted = adapted_paths(bank)
    prefix = f"{entry}." if entry else ""
    todo = [(prefix + name, m) for name, m in model.get_submodule(entry).named_children()]
    while todo:
        path, module = todo.pop(0)
        if path in adapted or not any(p.startswith(f"{path}.") for p in adapted):
            continue
        if hasattr(type(module), "forward") and not isinstance(module, _CONTAINERS):
            yield path, module
        else:
            todo = [(f"{path}.{name}", m) for name, m in module.named_children()] + todo


_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def _note_entries(model: nn.Module, bank: AdapterBank) -> None:
    """Hook the adapted modules so that it is known when their own forward runs."""
    modules = base_modules(model)
    for path in adapted_paths(bank) & modules.keys():
        hooks = modules[path]._forward_pre_hooks
        if not any(isinstance(hook, Entering) for hook in hooks.values()):
            modules[path].register_forward_pre_hook(Entering(bank, path), with_kwargs=True)


def restore_parts(model: nn.Module) -> None:
    """Give all parts the classes that they had."""
    for module in model.modules():
        if is_extended(module, PART):
            module.__class__ = original_class(module)


def entry_forward(model: nn.Module, entry: str, asked: set[str]) -> tuple[Any, Any]:
    """The forward of a part of the model: bound, to read its signature; and as one of the model.

    The latter adds the names of attributes that it asks for to ``asked``.
    """
    if not entry:
        forward = original_class(model).forward
        return forward.__get__(model), forward

    def run(shell: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Not the module itself: its hooks run around the graph, where the part is called.
        part = shell.get_submodule(entry)
        with attribute_reads_noted(part, asked):
            return part.forward(*args, **kwargs)

    return model.get_submodule(entry).forward, run
