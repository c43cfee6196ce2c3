"""Merging into HQQ's layers, which keep the configuration that they were quantised with."""

import copy
from typing import Any

from torch import Tensor, nn

from vera_fx.products.writing.rewriting import FOUR_BITS, Held, Rewriting


def refusal(module: nn.Module) -> str | None:
    """Where a layer does not say how it was quantised."""
    layer: Any = module
    config = layer.quant_config
    if not (config and config.get("weight_quant_params")):
        return "(hqq) does not say how it was quantised (quant_config)"
    if config.get("scale_quant_params") or config.get("zero_quant_params") or layer.offload_meta:
        return "(hqq) has quantised or offloaded scales, which hqq no longer makes"
    return None


def write(module: nn.Module, dense: Tensor) -> None:
    """Write a matrix, by the layer's own method and configuration (HQQ)."""
    layer: Any = module
    config = copy.deepcopy(layer.quant_config)
    layer._parameters.pop("W_q")  # the method sets a tensor, then makes a parameter of it
    layer.quantize(dense.detach().clone(), **config)


def stored(module: nn.Module) -> Held:
    """The packed values, and the scales."""
    layer: Any = module
    return {"W_q": layer.W_q, "meta": layer.meta}


def restore(module: nn.Module, held: Held) -> None:
    """Let the layer have them again."""
    layer: Any = module
    layer._parameters.pop("W_q", None)
    layer.__dict__.pop("W_q", None)  # left by a `write` that failed
    layer.W_q, layer.meta = held["W_q"], held["meta"]


def is_coarse(module: nn.Module) -> bool:
    """As the layer says."""
    layer: Any = module
    return layer.meta["nbits"] <= FOUR_BITS


REWRITING = Rewriting(write, stored, restore, is_coarse, refusal)
