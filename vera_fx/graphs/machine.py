"""What the machine can do and what it is set to, as far as that decides between graphs and plans."""

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import cpu

from vera_fx._context import registered
from vera_fx._torch import any_autocast, default_device, device_types
from vera_fx._torch_graphs import wants_cuda_graphs
from vera_fx.passes import DEVICES, Device

MEASURED = "measured devices"
"""Where `calibrate` keeps what it has measured, by the name of the device, for the process."""

_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
_FP16 = ("avx512_fp16", "amx_fp16", "fp16_arith")


def multiplies_well(dtype: torch.dtype, device: torch.device) -> bool:
    """True if products in ``dtype`` are at least as fast as in float32.

    Accelerators multiply bfloat16 and float16 faster. A CPU does if it has instructions for them
    (`torch.cpu.get_capabilities`); without any, one such product takes up to a hundred times as
    long as a float32 one.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or _has_instructions(dtype)


def costs_of(device: torch.device) -> Device:
    """What a device can do: as `calibrate` measured it, else as the table of devices has it."""
    measured = registered(MEASURED).get(device_name(device))
    if measured is not None:
        return measured
    if device.type == "cpu":
        return _cpu()
    found = DEVICES[known_as(device.type, device_name(device))]
    if found.tensor_single and torch.get_float32_matmul_precision() != "highest":
        found = replace(found, single=found.tensor_single)
    if found.graph_launch and wants_cuda_graphs():
        found = replace(found, launch=found.graph_launch)
    return found


def known_as(kind: str, name: str) -> str:
    """The key in the table of devices for a torch device type and the name that torch gives it.

    Unknown CUDA devices count as an A100, other unknown accelerators as Intel's.
    """
    if kind in DEVICES:
        return kind
    keys = [key for key in DEVICES if not key.startswith("cpu") and key in name.lower()]
    return max(keys, key=len, default="a100" if kind == "cuda" else "xpu")


def device_name(device: torch.device) -> str:
    """What a device is called, so that equal ones have one name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def _cpu() -> Device:
    """The processor's row, for the threads that torch has now."""
    found = DEVICES[f"cpu {_generation()}"]
    scale = torch.get_num_threads() / 2
    return replace(
        found,
        single=scale * found.single,
        half=scale * found.half,
        bandwidth=scale * found.bandwidth,
    )


def _generation() -> str:
    capabilities = cpu.get_capabilities()
    if capabilities.get("architecture") == "aarch64":
        return "arm"
    if capabilities.get("amx_tile"):
        return "amx"
    return "avx512" if capabilities.get("avx512_f") else "avx2"


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
