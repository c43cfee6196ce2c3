"""Where the bank hangs: a submodule like others, but no element of models that are containers.

``nn.Sequential``, lists and dictionaries of modules, and classes like them (sentence-transformers)
count, slice and call what stands in their ``_modules``, where a bank would be one more layer. There
it is kept beside them, and what walks the model's modules is extended by it.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.base.modules import BANK


def is_container(base: type[nn.Module]) -> bool:
    """True for classes that count, index or iterate over something: their modules, surely."""
    return any(hasattr(base, name) for name in ("__len__", "__iter__", "__getitem__"))


def place_bank(model: nn.Module, bank: AdapterBank) -> None:
    """Hang the bank on the model."""
    if is_container(type(model)):
        model.__dict__[BANK] = bank
    else:
        model.add_module(BANK, bank)


def remove_bank(model: nn.Module) -> None:
    """Take the bank off the model, if there is one."""
    model.__dict__.pop(BANK, None)
    model._modules.pop(BANK, None)


def container_methods(base: type[nn.Module]) -> dict[str, Any]:
    """The methods that an extended class of containers needs to know its bank; none for others."""
    if not is_container(base):
        return {}
    makers = (_named_modules, _apply, _train, _save, _load)
    return {method.__name__: method for method in (make(base) for make in makers)}


class _Method(Protocol):
    __name__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _named_modules(base: Any) -> _Method:
    def named_modules(
        self: nn.Module,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        is_new = self not in memo or not remove_duplicate
        yield from base.named_modules(self, memo, prefix, remove_duplicate)
        if is_new:
            start = f"{prefix}.{BANK}" if prefix else BANK
            yield from bank_of(self).named_modules(memo, start, remove_duplicate)

    return named_modules


def _apply(base: Any) -> _Method:
    def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = base._apply(self, *args, **kwargs)
        bank_of(self)._apply(*args, **kwargs)
        return result

    return _apply


def _train(base: Any) -> _Method:
    def train(self: nn.Module, mode: bool = True) -> Any:
        result = base.train(self, mode)
        bank_of(self).train(mode)
        return result

    return train


def _save(base: Any) -> _Method:
    def _save_to_state_dict(
        self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        base._save_to_state_dict(self, destination, prefix, keep_vars)
        bank = bank_of(self)
        bank.state_dict(destination=destination, prefix=f"{prefix}{BANK}.", keep_vars=keep_vars)

    return _save_to_state_dict


def _load(base: Any) -> _Method:
    def _load_from_state_dict(
        self: nn.Module,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        *rest: Any,
    ) -> None:
        _, missing_keys, unexpected_keys, error_msgs = rest
        start = f"{prefix}{BANK}."
        # What is the bank's goes out of the state, which is a copy of what was given.
        own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        base._load_from_state_dict(self, state_dict, prefix, local_metadata, *rest)
        values = {key.removeprefix(start): value for key, value in own.items()}
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            keys = bank_of(self).load_state_dict(values, strict=False, assign=assign)
        except RuntimeError as error:  # of other sizes
            error_msgs.append(str(error))
            return
        missing_keys += [start + key for key in keys.missing_keys]
        unexpected_keys += [start + key for key in keys.unexpected_keys]

    return _load_from_state_dict
