"""Extends a model's class in place: same object, same parameters, another way to run forward."""

import inspect
from typing import Any, cast

from torch import nn

from vera_fx._context import class_made_of, traced_by_others
from vera_fx._torch import skip_frame
from vera_fx.bank.bank import bank_of
from vera_fx.base.modules import original_class
from vera_fx.graphs.around import finish, prepare
from vera_fx.model.methods import methods_for
from vera_fx.model.python_run import run_in_python


class Adapted:
    """Mixed into the class of an adapted model; ``vera_fx.unload`` takes it out again."""

    _vera_base: type[nn.Module]

    def extra_repr(self) -> str:
        """One line for ``print(model)``: the adapters, beside the model's own."""
        model = cast("nn.Module", self)
        own = self._vera_base.extra_repr(model)
        return "\n".join(line for line in (own, f"vera_fx: {bank_of(model).extra_repr()}") if line)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Here, and not in the bank: before the base's first tensor is written to.
        model = cast("nn.Module", self)
        bank_of(model).check_loading(state_dict, prefix)
        self._vera_base._load_from_state_dict(model, state_dict, prefix, *rest)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle and deepcopy rebuild the extended class from the original, which is importable.
        return _rebuild, (self._vera_base,), cast("nn.Module", self).__getstate__()


def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of an adapted ``base``: a subclass with the same name and call signature."""
    return class_made_of(base, "adapted", _extended)


def _extended(base: type[nn.Module]) -> type[nn.Module]:
    forward = _forward_for(base)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    names |= methods_for(base)
    # The name stays: transformers looks models up by the name of their class.
    kind = type(base.__name__, (Adapted, base), {**names, "_vera_base": base, "forward": forward})
    return cast("type[nn.Module]", kind)


def _forward_for(base: type[nn.Module]) -> Any:
    """The graph-running forward under the signature of ``base.forward``.

    Only ``__signature__`` is copied: following ``__wrapped__`` would lead accelerate, which unwraps
    forwards, to the unadapted one.
    """

    @skip_frame
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if traced_by_others():
            # Someone else traces the model: hooks put the branches into the trace.
            return base.forward(self, *args, **kwargs)
        prepared = prepare(self, args, kwargs)
        if prepared is None:
            return run_in_python(self, base.forward, args, kwargs)
        return finish(prepared, prepared.graph(*prepared.call.leaves))

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    return forward


def _rebuild(base: type[nn.Module]) -> nn.Module:
    return cast("nn.Module", object.__new__(adapted_class(base)))


def extend(model: nn.Module) -> None:
    """Give ``model`` the extended class."""
    model.__class__ = adapted_class(type(model))


def restore_class(model: nn.Module) -> None:
    """Give ``model`` its original class back."""
    model.__class__ = original_class(model)


def is_adapted(model: nn.Module) -> bool:
    """True if ``model`` has been adapted and not unloaded."""
    return isinstance(model, Adapted)
