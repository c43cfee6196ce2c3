"""Which attributes of modules the code of a forward asks for: exactly, by name."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from vera_fx.base.modules import PART, extended_class, is_extended

ALL = "__dict__"
"""Code that asks for the whole dictionary of a module may read any attribute."""

_NOTED = "noted"


@contextlib.contextmanager
def attribute_reads_noted(module: nn.Module, into: set[str]) -> Iterator[None]:
    """Inside the block the names of all attributes that are asked of the modules are added to ``into``.

    Args:
        module: a twin of a module of the model, as its class and those of all modules in it are other
            ones meanwhile. Of a part of the model itself, which other threads may call, nothing is
            noted but that it may read anything.
        into: the names. ``__dict__`` is among them if code other than torch's asks for that.
    """
    if is_extended(module, PART):
        into.add(ALL)
        yield
        return
    plain = [(m, type(m)) for m in module.modules() if not is_extended(m, _NOTED)]
    classes = {cls: _noting(cls, into) for _, cls in plain}
    try:
        for inner, cls in plain:
            inner.__class__ = classes[cls]
        yield
    finally:
        for inner, cls in plain:
            inner.__class__ = cls


def _noting(base: type[nn.Module], into: set[str]) -> type[nn.Module]:
    plain = base.__getattribute__

    def noted(self: nn.Module, name: str) -> Any:
        if name != ALL or not _asked_by_torch():
            into.add(name)
        return plain(self, name)

    return extended_class(base, _NOTED, {"__getattribute__": noted})


def _asked_by_torch() -> bool:
    """True where ``nn.Module`` itself looks a parameter up."""
    asking = sys._getframe(2).f_globals.get("__name__", "")
    return str(asking).startswith("torch.")
