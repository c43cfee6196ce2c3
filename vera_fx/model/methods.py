"""The methods that an adapted class has in the place of its base's, beside forward."""

from collections.abc import Callable
from typing import Any

from torch import nn

from vera_fx.model.generation import generation_methods
from vera_fx.processes.broadcast import broadcast_methods

Maker = Callable[[type[nn.Module]], dict[str, Any]]
_MAKERS: list[Maker] = [generation_methods, broadcast_methods]


def also(maker: Maker) -> None:
    """Let adapted classes have the methods that ``maker`` makes: for rooms above this one."""
    _MAKERS.append(maker)


def methods_for(base: type[nn.Module]) -> dict[str, Any]:
    """All of them, by name."""
    return {name: method for maker in _MAKERS for name, method in maker(base).items()}
