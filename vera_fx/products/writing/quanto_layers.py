"""Merging into optimum-quanto's layers, which quantise a plain weight when they are frozen."""

from typing import Any

from torch import Tensor, nn

from vera_fx.products.writing.rewriting import FOUR_BITS, Rewriting, parameter_of, restore_parameter


def write(module: nn.Module, dense: Tensor) -> None:
    """Write a matrix, quantised by the layer's own type, groups and optimiser."""
    layer: Any = module
    trains = layer.weight.requires_grad
    layer.weight = nn.Parameter(dense.detach().clone(), requires_grad=False)
    layer.freeze()
    layer.weight.requires_grad_(trains)


def is_coarse(module: nn.Module) -> bool:
    """As the layer says."""
    layer: Any = module
    return layer.weight_qtype.bits <= FOUR_BITS


REWRITING = Rewriting(write, parameter_of, restore_parameter, is_coarse)
