"""What the processor can do that decides between plans."""

from torch import Tensor, cpu, dtype, float16

_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
_FP16 = ("avx512_fp16", "amx_fp16", "fp16_arith")


def multiplies_well(weight: Tensor) -> bool:
    """True if products in the dtype of ``weight`` are at least as fast as in float32.

    Accelerators multiply bfloat16 and float16 faster. A CPU does if it has instructions for them
    (`torch.cpu.get_capabilities`); without any, one such product takes up to a hundred times as
    long as a float32 one.
    """
    return weight.device.type != "cpu" or _has_instructions(weight.dtype)


def _has_instructions(kind: dtype) -> bool:
    capabilities = cpu.get_capabilities()
    return any(capabilities.get(name) for name in (_FP16 if kind == float16 else _BF16))
