"""DVoRA's tensors: VeRA's, and the magnitude of every row of a target's weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vera_fx.branches.protocol import Dims, Tensors
from vera_fx.branches.vera.parameters import VeraParameters
from vera_fx.config import AdapterConfig
from vera_fx.passes import Target

MAGNITUDE = "vera_magnitude_vector"


@dataclass(frozen=True, slots=True)
class DVoraParameters(VeraParameters):
    """As `VeraParameters`, and ``vera_magnitude_vector (out,)``."""

    @property
    def own(self) -> Mapping[str, Dims]:
        """The vectors and the magnitude."""
        return {**VeraParameters().own, MAGNITUDE: ("out",)}

    @property
    def unrounded(self) -> frozenset[str]:
        """The magnitude: rounded to a half precision it would not be the base's own."""
        return frozenset({MAGNITUDE})

    def first(self, config: AdapterConfig, target: Target, weight: Callable[[], Tensor]) -> Tensors:
        """VeRA's first values, and the norms of the base weight's rows."""
        W = weight().detach()
        norms = W.to(torch.promote_types(W.dtype, torch.float32)).norm(dim=1)
        return {**VeraParameters().first(config, target, weight), MAGNITUDE: norms}
