"""A stand-in for a model to be exported: the same tensors and classes, but modules of its own.

torch.export puts fake tensors into the modules that it traces, and runs their Python, which may write
to them. Calls of the model in other threads must see neither.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from operator import is_
from types import MethodType
from typing import Any

from torch import nn

from vera_fx.base.hf import HOOKED
from vera_fx.base.modules import BANK, HOOKS, in_bank, original_class
from vera_fx.capturing.stand_ins import stand_in
from vera_fx.products.kinds import is_idle, stands_for
from vera_fx.products.opaque import is_opaque

_WRAPPERS = ("forward", "_compiled_call_impl")
"""What wrappers put on a model's object (accelerate's forward, ``nn.Module.compile``), for real calls."""

Twins = Mapping[int, nn.Module]


def shell_of(model: nn.Module, run: Any, names: Sequence[str], *, live: bool = False) -> nn.Module:
    """A twin of ``model`` without its bank, whose forward is ``run`` and takes ``names`` alone.

    torch.export reads the forward's signature, and would turn Hugging Face's ``**kwargs`` into one
    bundle that no dynamic shape can be given for.

    Args:
        model: the model.
        run: what the shell's forward does: called with the shell and the arguments.
        names: of the arguments.
        live: take the model's own modules below the shell, for code that holds on to them.
    """
    modules = {path: m for path, m in model.named_modules() if not in_bank(path)}
    stood_for = {} if live else {path: m for path, m in modules.items() if path and _is_called(m)}
    twins = {id(module): stand_in(module, path) for path, module in stood_for.items()}
    plain = [model] if live else [m for m in modules.values() if id(m) not in twins]
    shell = _twins(plain, twins)[id(model)]
    base = original_class(model)
    shell.__class__ = type(base.__name__, (base,), {"forward": _forward(run, names)})
    for name in _WRAPPERS:
        shell.__dict__.pop(name, None)
    return shell


def _is_called(module: nn.Module) -> bool:
    """True for what graphs call, or compute by a function of its own."""
    return is_opaque(module) or stands_for(module)


def _forward(run: Any, names: Sequence[str]) -> Any:
    def forward(self: nn.Module, **given: Any) -> Any:
        return run(self, **given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def _twins(modules: Sequence[nn.Module], known: Twins) -> dict[int, nn.Module]:
    """For each module, by identity, one of the same class over the same tensors; the first is the model.

    Args:
        modules: the modules.
        known: twins that others of the model's modules have already.
    """
    new = {id(module): object.__new__(original_class(module)) for module in modules}
    twins = {**known, **new}
    for module in modules:
        state = twins[id(module)].__dict__
        for name, value in module.__dict__.items():
            if (module is modules[0] and name == BANK) or name == HOOKED:  # hooks stay behind
                continue
            state[name] = type(value)() if name in HOOKS else _moved(value, twins)
        if is_idle(module):
            del state["forward"]  # which holds on to the live module, and would do nothing else
        for name in ("_parameters", "_buffers"):
            state[name] = dict(module.__dict__[name])
        children = module._modules.items()
        state["_modules"] = {
            name: child if child is None else twins.get(id(child), child)
            for name, child in children
            if not (module is modules[0] and name == BANK)
        }
    return twins


def _moved(value: Any, twins: Twins, depth: int = 0) -> Any:
    """A value with twins in the place of the modules in it; itself if there are none."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, MethodType):
        owner = _moved(value.__self__, twins, depth)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        old = value.func, value.args, value.keywords
        func, args, keywords = (_moved(part, twins, depth) for part in old)
        same = all(map(is_, old, (func, args, keywords)))
        return value if same else functools.partial(func, *args, **keywords)
    if depth > 4:  # noqa: PLR2004  # deep enough for lists of lists of modules
        return value
    return _moved_container(value, twins, depth + 1)


def _moved_container(value: Any, twins: Twins, depth: int) -> Any:
    if type(value) is dict:
        new = {key: _moved(part, twins, depth) for key, part in value.items()}
        return new if any(new[key] is not value[key] for key in value) else value
    if type(value) in {list, tuple}:
        parts = [_moved(part, twins, depth) for part in value]
        return value if all(map(is_, parts, value)) else type(value)(parts)
    return value
