"""What ``DistributedDataParallel`` leaves alone of an adapted model: the shared frozen tensors.

They are buffers, which it would broadcast before every forward: more bytes than the gradients. Every
process has the same ones, from the same seed or the same file.
"""

from typing import Any

from torch import nn

from vera_fx.bank.bank import bank_of
from vera_fx.base.modules import BANK

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def broadcast_methods(_base: type[nn.Module]) -> dict[str, Any]:
    """The attribute that ``DistributedDataParallel`` asks a model for."""
    return {_IGNORED: property(_ignored, _set_ignored)}


def _ignored(self: nn.Module) -> list[str]:
    own = self.__dict__.get(_IGNORED, ())  # the user's, for tensors of the base
    shared = bank_of(self).projections.named_buffers(prefix=f"{BANK}.projections")
    return [*own, *(name for name, _ in shared)]


def _set_ignored(self: nn.Module, names: list[str]) -> None:
    self.__dict__[_IGNORED] = names
