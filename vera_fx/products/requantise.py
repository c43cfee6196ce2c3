"""Writes a changed matrix back into a quantised layer, by the library's own means: PEFT's way to merge."""

from typing import Any

from torch import Tensor, nn


def bitsandbytes_8bit(module: nn.Module, dense: Tensor) -> Tensor:
    """Quantised again, row by row (LLM.int8(), arXiv 2208.07339)."""
    from bitsandbytes.nn import Int8Params

    old: Any = module.weight
    new: Any = Int8Params(
        dense.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights
    )
    return new.to(old.device)


def bitsandbytes_4bit(module: nn.Module, dense: Tensor) -> Tensor:
    """Quantised again in the same type, block by block (QLoRA, arXiv 2305.14314)."""
    from bitsandbytes.nn import Params4bit

    old: Any = module.weight
    facts = ("quant_type", "blocksize", "compress_statistics", "quant_storage")
    same = {name: getattr(old, name) for name in facts}
    new: Any = Params4bit(dense.to("cpu").contiguous(), requires_grad=False, module=module, **same)
    return new.to(old.device)
