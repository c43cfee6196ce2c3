"""What the library does to bitsandbytes' layers beyond calling them."""

import importlib
from typing import Any

from torch import Tensor, nn

from vera_fx.products.writing.rewriting import Held, Rewriting

_PACKS = "support_avx512bf16_for_cpu"


def _library(room: str) -> Any:
    """A module of bitsandbytes, which is there if a layer of it is."""
    return importlib.import_module(f"bitsandbytes.{room}")


def keep_gradients(module: nn.Module) -> bool:
    """Keep a 4-bit layer on a CPU with AVX512-BF16 from packing its weight; True if it would have.

    One call without gradients packs it for a product that passes no gradient on, silently. What is
    packed already is unpacked, but the packing has rounded the scales of its blocks to bfloat16.
    """
    layer: Any = module
    if not getattr(layer, _PACKS, False):
        return False
    setattr(layer, _PACKS, False)
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # Private in bitsandbytes 0.50, and the library's own way before it saves a weight.
        unpack: Any = _library("functional")._convert_weight_packed_for_cpu_inverse
        layer.weight.data, state = unpack(layer.weight.data, state)
        if not state.nested:
            state.absmax = state.absmax.float()  # left in the compute dtype, which no kernel takes
        layer.weight.quant_state = layer.quant_state = state
    return True


def allow_packing(module: nn.Module) -> None:
    """Undo `keep_gradients`."""
    setattr(module, _PACKS, True)


def requantise_8bit(module: nn.Module, dense: Tensor) -> None:
    """Write a matrix, quantised row by row (LLM.int8(), arXiv 2208.07339)."""
    layer: Any = module
    old = layer.weight
    new = _library("nn").Int8Params(
        dense.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights
    )
    layer.weight = new.to(old.device)
    layer.init_8bit_state()


def requantise_4bit(module: nn.Module, dense: Tensor) -> None:
    """Write a matrix, quantised in the layer's type, block by block (QLoRA, arXiv 2305.14314)."""
    layer: Any = module
    old = layer.weight
    facts = ("quant_type", "blocksize", "compress_statistics", "quant_storage")
    same = {name: getattr(old, name) for name in facts}
    new = _library("nn").Params4bit(
        dense.to("cpu").contiguous(), requires_grad=False, module=layer, **same
    )
    layer.weight = new.to(old.device)


def stored(module: nn.Module) -> Held:
    """What holds a layer's weight now, to be given back by `restore`."""
    layer: Any = module
    state = getattr(layer, "state", None)
    held = {name: getattr(state, name, None) for name in ("CB", "SCB")} if state else {}
    return {
        "weight": layer.weight,
        "quant_state": getattr(layer, "quant_state", None),
        "state": held,
    }


def restore(module: nn.Module, held: Held) -> None:
    """Let the layer hold again what `stored` has given."""
    layer: Any = module
    layer.weight = held["weight"]
    if held["quant_state"] is not None:
        layer.quant_state = held["quant_state"]
    for name, value in held["state"].items():
        setattr(layer.state, name, value)


REWRITING_8BIT = Rewriting(requantise_8bit, stored, restore, lambda _: False)
REWRITING_4BIT = Rewriting(requantise_4bit, stored, restore, lambda _: True)
