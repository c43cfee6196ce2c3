"""``generate(..., adapter_names=[...])``: a batch that mixes adapters, kept up token by token."""

import functools
import inspect
from typing import Any

from torch import nn

from vera_fx._context import is_capturing
from vera_fx.bank.bank import bank_of
from vera_fx.graphs.around import finish, prepare, run
from vera_fx.mixing.check import check_mixture, stored_of
from vera_fx.mixing.kept_names import held_by, names_for_rows


def generation_methods(base: type[nn.Module]) -> dict[str, Any]:
    """The methods that an extended class needs for it, if ``base`` can generate at all."""
    found: dict[str, Any] = {}
    if callable(getattr(base, "generate", None)):
        found["generate"] = _generate(base)
    if callable(getattr(base, "get_encoder", None)):
        found["get_encoder"] = _get_encoder(base)
    return found


def _generate(base: Any) -> Any:
    @functools.wraps(base.generate)
    def generate(self: Any, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return base.generate(self, *args, **kwargs)
        check_mixture(self, adapter_names)  # before the first token
        bank = bank_of(self)
        with names_for_rows(bank, tuple(adapter_names), stored_of(bank, adapter_names)):
            return base.generate(self, *args, **kwargs)

    return generate


def _get_encoder(base: Any) -> Any:
    @functools.wraps(base.get_encoder)
    def get_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
        encoder = base.get_encoder(self, *args, **kwargs)
        if is_capturing() or held_by(bank_of(self)) is None:
            return encoder
        return EncoderEntry(self, encoder)

    return get_encoder


class EncoderEntry:
    """Stands in for a model's encoder while rows have adapters of their own.

    ``generate`` calls the encoder directly, where no graph of the whole model serves it; here it
    gets a graph of its own.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module) -> None:
        self._model, self._encoder = model, encoder
        self._path = next(path for path, module in model.named_modules() if module is encoder)
        self.forward = self._forward(inspect.signature(encoder.forward))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the encoder's graph."""
        return self.forward(*args, **kwargs)

    def _forward(self, signature: inspect.Signature) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(self._model, args, kwargs, self._path)
            if prepared is None:  # not in a mixture any more
                return self._encoder(*args, **kwargs)
            return finish(prepared, run(prepared))

        forward.__signature__ = signature  # type: ignore[attr-defined]
        return forward
