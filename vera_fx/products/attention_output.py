"""``nn.MultiheadAttention.out_proj``: a linear module that is never called.

Its parent reads weight and bias and multiplies by a function. Graphs see the product all the same;
a library that swaps modules, or adds hooks to them, adapts nothing there.
"""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vera_fx.products.linear import Linear


@dataclass(frozen=True, slots=True)
class AttentionOutput(Linear):
    """As `Linear`, under a name of its own: where a model runs in Python it cannot be adapted."""

    @property
    def name(self) -> str:
        """Torch's name."""
        return "nn.MultiheadAttention.out_proj"

    def owns(self, module: nn.Module) -> bool:
        """The class that torch uses for it."""
        return isinstance(module, NonDynamicallyQuantizableLinear)
