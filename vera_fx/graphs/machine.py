"""What the machine can do and what it is set to, as far as that decides between graphs and plans."""

from collections.abc import Hashable

import torch
from torch import cpu

from vera_fx._torch import any_autocast, default_device, device_types

_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
_FP16 = ("avx512_fp16", "amx_fp16", "fp16_arith")


def multiplies_well(dtype: torch.dtype, device: torch.device) -> bool:
    """True if products in ``dtype`` are at least as fast as in float32.

    Accelerators multiply bfloat16 and float16 faster. A CPU does if it has instructions for them
    (`torch.cpu.get_capabilities`); without any, one such product takes up to a hundred times as
    long as a float32 one.
    """
    return device.type != "cpu" or _has_instructions(dtype)


def _has_instructions(kind: torch.dtype) -> bool:
    capabilities = cpu.get_capabilities()
    return any(capabilities.get(name) for name in (_FP16 if kind == torch.float16 else _BF16))


def autocast_state() -> Hashable:
    """The autocast state that capture and execution happen under; None where it is off everywhere."""
    if not any_autocast():
        return None
    on = [kind for kind in device_types() if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in on) or None


def surroundings() -> Hashable:
    """What of torch's settings a captured graph may have baked in, beside grad mode."""
    return (
        autocast_state(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        default_device(),
    )
