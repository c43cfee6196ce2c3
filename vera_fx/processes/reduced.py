"""Training in several processes: refuses calls after which the processes would hold different adapters."""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vera_fx._torch import active_ddp, reduced_by
from vera_fx.bank.bank import bank_of
from vera_fx.errors import AdapterError, listing

if TYPE_CHECKING:
    from collections.abc import Iterator


class Reduced:
    """Which parameters the wrapper around a model reduces; asked once for each wrapper."""

    def __init__(self) -> None:
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None
        self._known: frozenset[int] = frozenset()

    def by(self, wrapper: DistributedDataParallel) -> frozenset[int]:
        """Identities of the parameters that ``wrapper`` reduces."""
        if self._wrapper is None or self._wrapper() is not wrapper:
            self._known, self._wrapper = reduced_by(wrapper), weakref.ref(wrapper)
        return self._known


def check_reduced(model: nn.Module, reduced: Reduced) -> None:
    """Refuse a training call under a ``DistributedDataParallel`` that does not know what trains now.

    Raises:
        AdapterError: with the adapters that were added or switched to since it was made.
    """
    wrapper = active_ddp() if torch.is_grad_enabled() else None
    if wrapper is None:
        return
    unknown = dict.fromkeys(_unknown(model, reduced.by(wrapper)))
    if unknown:
        raise AdapterError(
            f"adapter {listing(unknown)} trains now, but not when this {type(model).__name__} was wrapped in "
            "DistributedDataParallel, which therefore would not reduce its gradients, and every process "
            "would train another adapter; wrap the model again after adapt, add_adapter and set_adapter: "
            "DistributedDataParallel(wrapper.module)"
        )


def _unknown(model: nn.Module, known: frozenset[int]) -> "Iterator[str]":
    binding = bank_of(model).slots.binding
    for name, slot in zip(binding.names, binding.slots, strict=True):
        trained = (id(tensor) for tensor in slot.tensors().values() if tensor.requires_grad)
        if not known.issuperset(trained):
            yield name
