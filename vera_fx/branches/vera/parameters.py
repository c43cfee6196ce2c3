"""VeRA's tensors: A and B, drawn exactly as PEFT 0.21 draws them, and two vectors for each target."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from vera_fx.branches.protocol import Dims, Tensors
from vera_fx.config import AdapterConfig
from vera_fx.passes import Target

if TYPE_CHECKING:
    from vera_fx.branches.vera.config import VeraConfig

A, B = "vera_A", "vera_B"
D_VECTOR, B_VECTOR = "vera_lambda_d", "vera_lambda_b"


def draw_projections(r: int, max_in: int, max_out: int, key: int) -> tuple[Tensor, Tensor]:
    """Draw ``vera_A (r, max_in)`` and ``vera_B (max_out, r)`` in float32 on the CPU.

    Kaiming uniform with gain sqrt(2) (paper, section 3.3), one generator seeded with ``key``,
    A first and then B: the order and bounds of PEFT's ``VeraModel._init_vera_A_vera_B``.
    """
    generator = torch.Generator(device="cpu").manual_seed(key)
    return _kaiming(r, max_in, generator), _kaiming(max_out, r, generator)


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True, slots=True)
class VeraParameters:
    """``vera_A (r, in)`` and ``vera_B (out, r)``, shared; ``lambda_d (r,)`` and ``lambda_b (out,)``, own."""

    @property
    def shared(self) -> Mapping[str, Dims]:
        """The projections."""
        return {A: ("r", "in"), B: ("out", "r")}

    @property
    def own(self) -> Mapping[str, Dims]:
        """The vectors."""
        return {D_VECTOR: ("r",), B_VECTOR: ("out",)}

    @property
    def unrounded(self) -> frozenset[str]:
        """None: PEFT rounds all of them."""
        return frozenset()

    def draw(self, config: AdapterConfig, max_in: int, max_out: int) -> Tensors:
        """The projections, from the configuration's seed."""
        return self.redraw(self.seed(config), config.r, max_in, max_out)

    def redraw(self, seed: int, r: int, max_in: int, max_out: int) -> Tensors:
        """The projections, from a seed."""
        return dict(zip((A, B), draw_projections(r, max_in, max_out, seed), strict=True))

    def first(self, config: AdapterConfig, target: Target, weight: Callable[[], Tensor]) -> Tensors:
        """``d_initial`` and zeros, so that training starts at the base (paper, section 3.2)."""
        del weight
        out = target.out_features
        if config.init_weights:
            d_initial = float(cast("VeraConfig", config).d_initial)
            return {D_VECTOR: torch.full((config.r,), d_initial), B_VECTOR: torch.zeros(out)}
        return {D_VECTOR: torch.randn(config.r), B_VECTOR: torch.ones(out)}

    def seed(self, config: AdapterConfig) -> int:
        """``projection_prng_key``."""
        return cast("VeraConfig", config).projection_prng_key
