"""Extends a model's class in place: same object, same parameters, another way to run forward."""

import inspect
from typing import Any, NoReturn, cast

from torch import nn

from vera_fx._context import class_made_of, traced_by_others
from vera_fx._torch import skip_frame
from vera_fx.bank.bank import bank_of, check_loading
from vera_fx.base.modules import ADAPTED, extended_class, is_extended, original_class
from vera_fx.errors import AdapterError
from vera_fx.folding.merging import resume
from vera_fx.graphs.around import finish, prepare, run, transformed
from vera_fx.model.containers import container_methods
from vera_fx.model.entries import make_entries
from vera_fx.model.methods import methods_for
from vera_fx.model.numbering import renumber
from vera_fx.model.python_run import run_in_python


def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of an adapted ``base``: a subclass with the same name and call signature."""
    return class_made_of(base, ADAPTED, _extended)


def _extended(base: type[nn.Module]) -> type[nn.Module]:
    methods = {"forward": _forward_for(base), "extra_repr": _extra_repr, "__reduce_ex__": _reduce}
    methods |= {
        "__setstate__": _restore,
        "__new__": _plain,
        "_replicate_for_data_parallel": _refuse_replica,
    }
    methods |= methods_for(base) | container_methods(base)
    load = methods.get("_load_from_state_dict", base._load_from_state_dict)
    methods["_load_from_state_dict"] = _checked(load)
    return extended_class(base, ADAPTED, methods)


def _checked(load: Any) -> Any:
    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *rest: Any) -> None:
        # Here, and not in the bank: before the base's first tensor is written to.
        check_loading(bank_of(self), state_dict, prefix)
        renumber(bank_of(self), state_dict, prefix)
        load(self, state_dict, prefix, *rest)

    return _load_from_state_dict


def _extra_repr(self: Any) -> str:
    """One line for ``print(model)``: the adapters, beside the model's own."""
    own = original_class(self).extra_repr(self)
    return "\n".join(line for line in (own, f"vera_fx: {bank_of(self).extra_repr()}") if line)


def _reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:
    # Pickle and deepcopy rebuild the extended class from the original, which is importable.
    return _rebuild, (original_class(self),), self.__getstate__()


def _restore(self: Any, state: dict[str, Any]) -> None:
    original_class(self).__setstate__(self, state)
    make_entries(self)
    bank = bank_of(self)
    if bank.owed:  # of a copy made inside disable_adapters, which took them out of the original
        resume(self, bank)
        bank.owed = False


def _plain(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """What calling the class makes: a model as it was, without adapters.

    Slices of ``nn.Sequential`` and ``from_pretrained`` call the class of the model at hand.
    """
    return cast("Any", cls)._vera_base(*args, **kwargs)  # no instance of cls: no second __init__


def _refuse_replica(self: Any) -> NoReturn:
    name = original_class(self).__name__
    raise AdapterError(
        f"torch.nn.DataParallel cannot copy this {name}: it is adapted, and graphs read the weights of "
        "the model that they were captured from, not a replica's; use DistributedDataParallel, one "
        "process per device, or one device (CUDA_VISIBLE_DEVICES)"
    )


def _forward_for(base: type[nn.Module]) -> Any:
    """The graph-running forward under the signature of ``base.forward``.

    Only ``__signature__`` is copied: following ``__wrapped__`` would lead accelerate, which unwraps
    forwards, to the unadapted one.
    """

    @skip_frame
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if traced_by_others() or transformed(self, kwargs):
            # Someone else traces or transforms the model: hooks put the branches there.
            return base.forward(self, *args, **kwargs)
        prepared = prepare(self, args, kwargs)
        if prepared is None:
            return run_in_python(self, base.forward, args, kwargs)
        return finish(prepared, run(prepared))

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
    return is_extended(model, ADAPTED)
