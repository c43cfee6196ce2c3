"""What it takes to merge into a quantised weight: read it, write a changed one, and give back what was."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Held = dict[str, Any]
"""What holds a module's weight, by attribute: the very objects."""


FOUR_BITS = 4
"""Up to here writing has to be asked for."""


def parameter_of(module: nn.Module) -> Held:
    """What holds the weight where the parameter holds everything."""
    return {"weight": module.weight}


def restore_parameter(module: nn.Module, held: Held) -> None:
    """Let a module have that parameter again."""
    module.weight = held["weight"]


def _never(module: nn.Module) -> str | None:
    del module
    return None


def _by_asking(module: nn.Module) -> Tensor | None:
    del module
    return None


@dataclass(frozen=True, slots=True)
class Rewriting:
    """How one library's layers take another weight.

    Attributes:
        write: writes the values of a plain matrix ``(out, in)`` into a module, quantised as its weight is.
        stored: gives what holds a module's weight now.
        restore: lets a module hold that again.
        is_coarse: whether a module's weight rounds so much that writing has to be asked for.
        refusal: why a module's weight cannot be written; None if it can.
        read: the matrix that a module's weight stands for; None where it is best asked by unit vectors.
    """

    write: Callable[[nn.Module, Tensor], None]
    stored: Callable[[nn.Module], Held]
    restore: Callable[[nn.Module, Held], None]
    is_coarse: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module], str | None] = _never
    read: Callable[[nn.Module], Tensor | None] = _by_asking
