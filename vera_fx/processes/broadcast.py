"""What ``DistributedDataParallel`` leaves alone of an adapted model: the shared frozen tensors.

They are buffers, which it would broadcast before every forward: more bytes than the gradients. Every
process has the same ones, from the same seed or the same file.

So are weights under tensor parallelism, which it would broadcast when it is made, and cannot.
"""

from typing import Any

from torch import nn

from vera_fx.bank.bank import bank_of
from vera_fx.base.modules import BANK
from vera_fx.base.sharding import is_distributed

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def broadcast_methods(_base: type[nn.Module]) -> dict[str, Any]:
    """The attribute that ``DistributedDataParallel`` asks a model for."""
    return {_IGNORED: property(_ignored, _set_ignored)}


def _ignored(self: nn.Module) -> list[str]:
    own = self.__dict__.get(_IGNORED, ())  # the user's, for tensors of the base
    shared = bank_of(self).projections.named_buffers(prefix=f"{BANK}.projections")
    parts = (
        name
        for name, tensor in self.named_parameters()
        if is_distributed(tensor) and not tensor.requires_grad
    )
    return [*own, *(name for name, _ in shared), *parts]


def _set_ignored(self: nn.Module, names: list[str]) -> None:
    self.__dict__[_IGNORED] = names
