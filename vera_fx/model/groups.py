"""Groups of parameters for an optimiser: vectors want other learning rates than heads."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from vera_fx.bank.adapter import Vectors
from vera_fx.bank.bank import AdapterBank
from vera_fx.config import check_finite
from vera_fx.errors import AdapterError, ConfigError
from vera_fx.graphs.runtime import require_adapted
from vera_fx.processes.wrapped import unwrapped

LR, HEAD_LR = 3e-2, 4e-3
"""Defaults: what the sweep of docs/quality.md found best for vectors, and the head's rate in it."""


def parameter_groups(
    model: nn.Module,
    *,
    lr: float = LR,
    head_lr: float = HEAD_LR,
    weight_decay: float = 0.0,
    head_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """What trains, in groups that any of torch's optimisers takes, and `Trainer` with them.

    ``"vectors"`` are the adapters' own tensors. ``"heads"`` are their copies of modules, and whatever else
    of the model requires gradients; ``"biases"`` are those of the latter that have one dimension,
    and are never decayed. Empty groups are left out. Choose which adapters train before.

    Args:
        model: adapted.
        lr: learning rate of the vectors; docs/recipes.md says what to try next.
        head_lr: of everything else.
        weight_decay: of the vectors, which it draws to zero: to the base.
        head_weight_decay: of trained heads' weights.

    Returns:
        Mappings with ``params``, ``lr``, ``weight_decay`` and ``name``.

    Raises:
        AdapterError: the model is not adapted, or nothing of it trains.
        ConfigError: a rate or decay that is negative or no finite number.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    _check(lr=lr, head_lr=head_lr)
    _check(weight_decay=weight_decay, head_weight_decay=head_weight_decay)
    vectors, heads, biases = _sorted_out(model, set(_vectors(bank)))
    return _present(
        _group("vectors", vectors, lr, weight_decay),
        _group("heads", heads, head_lr, head_weight_decay),
        _group("biases", biases, head_lr, 0.0),
    )


def _present(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    found = [group for group in groups if group["params"]]
    if not found:
        raise AdapterError(
            "parameter_groups: nothing of the model requires gradients; choose the adapters that are to train "
            "with vera_fx.set_adapter or set_trainable first"
        )
    return found


def _check(**amounts: Any) -> None:
    for name, value in amounts.items():
        check_finite(name, value)
        if value < 0:
            raise ConfigError(f"{name} must not be negative, got {value!r}")


def _vectors(bank: AdapterBank) -> Iterator[int]:
    for module in bank.modules():
        if isinstance(module, Vectors):
            yield from map(id, module.parameters())


def _sorted_out(
    model: nn.Module, own: set[int]
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Vectors, other weights and other one-dimensional parameters that train."""
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in own]
    return (
        [p for p in trained if id(p) in own],
        [p for p in others if p.ndim > 1],
        [p for p in others if p.ndim <= 1],
    )


def _group(name: str, params: list[nn.Parameter], lr: float, decay: float) -> dict[str, Any]:
    return {"params": params, "lr": lr, "weight_decay": decay, "name": name}
