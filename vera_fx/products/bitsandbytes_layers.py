"""What the library does to bitsandbytes' layers beyond calling them."""

from typing import Any

from torch import Tensor, nn

_PACKS = "support_avx512bf16_for_cpu"


def keep_gradients(module: nn.Module) -> bool:
    """Keep a 4-bit layer on a CPU with AVX512-BF16 from packing its weight; True if it would have.

    One call without gradients packs it for a product that passes no gradient on, silently. What is
    packed already is unpacked.
    """
    layer: Any = module
    if not getattr(layer, _PACKS, False):
        return False
    setattr(layer, _PACKS, False)
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            layer.weight.data, state
        )
    return True


def allow_packing(module: nn.Module) -> None:
    """Undo `keep_gradients`."""
    setattr(module, _PACKS, True)


def requantise_8bit(module: nn.Module, dense: Tensor) -> None:
    """Write a matrix, quantised row by row (LLM.int8(), arXiv 2208.07339)."""
    from bitsandbytes.nn import Int8Params

    layer: Any = module
    old = layer.weight
    new: Any = Int8Params(
        dense.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights
    )
    layer.weight = new.to(old.device)
    layer.init_8bit_state()


def requantise_4bit(module: nn.Module, dense: Tensor) -> None:
    """Write a matrix, quantised in the layer's type, block by block (QLoRA, arXiv 2305.14314)."""
    from bitsandbytes.nn import Params4bit

    layer: Any = module
    old = layer.weight
    facts = ("quant_type", "blocksize", "compress_statistics", "quant_storage")
    same = {name: getattr(old, name) for name in facts}
    new: Any = Params4bit(dense.to("cpu").contiguous(), requires_grad=False, module=layer, **same)
    layer.weight = new.to(old.device)


def stored(module: nn.Module) -> dict[str, Any]:
    """What holds a layer's weight now, to be given back by `restore`."""
    layer: Any = module
    state = getattr(layer, "state", None)
    held = {name: getattr(state, name, None) for name in ("CB", "SCB")} if state else {}
    return {
        "weight": layer.weight,
        "quant_state": getattr(layer, "quant_state", None),
        "state": held,
    }


def restore(module: nn.Module, held: dict[str, Any]) -> None:
    """Let the layer hold again what `stored` has given."""
    layer: Any = module
    layer.weight = held["weight"]
    if held["quant_state"] is not None:
        layer.quant_state = held["quant_state"]
    for name, value in held["state"].items():
        setattr(layer.state, name, value)
