"""What the paper's section 4.6 takes away from VeRA or puts in its place, done to an adapted model."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vera_fx


def _vectors(model: nn.Module, ending: str) -> list[nn.Parameter]:
    found = [p for name, p in model.named_parameters() if name.endswith(ending)]
    if not found:
        raise ValueError(f"the model has no {ending}")
    return found


def only_b(model: nn.Module) -> None:
    """Freeze d where it starts."""
    for d in _vectors(model, "lambda_d"):
        d.requires_grad_(requires_grad=False)


@torch.no_grad()
def only_d(model: nn.Module) -> None:
    """Freeze b at 1, and start d at 0, so that training still starts at the base."""
    for b in _vectors(model, "lambda_b"):
        b.fill_(1.0).requires_grad_(requires_grad=False)
    for d in _vectors(model, "lambda_d"):
        d.zero_()


@torch.no_grad()
def _redrawn(model: nn.Module, draw: Callable[[Tensor, torch.Generator], Any]) -> None:
    found = {
        n: p for n, p in model.named_buffers() if re.search(r"projections\.\d+\.vera_[AB]$", n)
    }
    if len(found) != 2:
        raise ValueError(f"expected one pair of projections, found {sorted(found)}")
    generator = torch.Generator().manual_seed(
        int(next(iter(found.values()))[0, 0].item() * 1e6) % 2**31
    )
    for projection in found.values():
        draw(projection, generator)


def normal(model: nn.Module) -> None:
    """Kaiming normal in the place of Kaiming uniform: the same variance."""
    _redrawn(model, lambda p, g: p.normal_(0, math.sqrt(2 / p.shape[1]), generator=g))


def positive(model: nn.Module) -> None:
    """Uniform in [0, 0.1]."""
    _redrawn(model, lambda p, g: p.uniform_(0, 0.1, generator=g))


def own_projections(model: nn.Module, fields: dict[str, Any], seed: int, head: str) -> nn.Module:
    """A and B of each target's own: an adapter for each target, all active at once."""
    endings = tuple(fields["target_modules"])
    paths = [name for name, _ in model.named_modules() if name.endswith(endings)]
    for at, path in enumerate(paths):
        config = vera_fx.VeraConfig(
            r=fields["r"],
            target_modules=re.escape(path),
            projection_prng_key=1000 * seed + at,
            modules_to_save=None if at else [head],
        )
        if at:
            vera_fx.add_adapter(model, f"own{at}", config)
        else:
            vera_fx.adapt(model, config, adapter_name="own0")
    vera_fx.set_adapter(model, [f"own{at}" for at in range(len(paths))])
    return model
