"""Layers over weights that only their own code reads, of the interfaces that libraries give theirs.

Each stores a matrix in another way, and can be asked for it (`dense`), which nothing in the library does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Scaled8Bit(nn.Module):
    """Codes of 8 bits with a scale per output, in buffers; the base of those below."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.name_sizes(*linear.weight.shape[::-1])
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.store((weight / scale).round().to(torch.int8), scale)
        self.bias = linear.bias

    def name_sizes(self, inside: int, outside: int) -> None:
        self.in_features, self.out_features = inside, outside

    def store(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = nn.Buffer(codes), nn.Buffer(scale)

    def dense(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1  # libraries keep notes while they run
        return F.linear(x, self.dense().to(x.dtype), self.bias)


class GPTQ(Scaled8Bit):
    """``gptqmodel``: features in one word, ``qweight`` and ``scales``, no ``weight``."""

    def name_sizes(self, inside: int, outside: int) -> None:
        self.infeatures, self.outfeatures, self.bits = inside, outside, 4

    def store(self, codes: Tensor, scale: Tensor) -> None:
        self.qweight, self.scales = nn.Buffer(codes.T.contiguous()), nn.Buffer(scale.T.contiguous())

    def dense(self) -> Tensor:
        return (self.qweight.to(self.scales.dtype) * self.scales).T


class AWQ(GPTQ):
    """``awq``: as GPTQ's, with the usual words for sizes."""

    def name_sizes(self, inside: int, outside: int) -> None:
        self.in_features, self.out_features, self.w_bit = inside, outside, 4


class EETQ(Scaled8Bit):
    """``eetq``: ``weight`` is a buffer of int8, the other way round."""

    def store(self, codes: Tensor, scale: Tensor) -> None:
        self.weight, self.weight_scales = nn.Buffer(codes.T.contiguous()), nn.Buffer(scale[:, 0])

    def dense(self) -> Tensor:
        return self.weight.T.to(self.weight_scales.dtype) * self.weight_scales[:, None]


class AQLM(Scaled8Bit):
    """``aqlm``: codes into codebooks, as parameters that do not train."""

    def store(self, codes: Tensor, scale: Tensor) -> None:
        books, numbers = (codes.to(scale.dtype) * scale).unique(return_inverse=True)
        self.codebooks = nn.Parameter(books, requires_grad=False)
        self.codes = nn.Parameter(numbers.to(torch.int16), requires_grad=False)

    def dense(self) -> Tensor:
        return self.codebooks[self.codes.long()]


class Compressed(nn.Linear):
    """``compressed_tensors``: an ``nn.Linear`` whose weight was taken away, ``weight_packed`` in its place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.bias = linear.bias
        weight = linear.weight.detach()
        del self.weight
        scale = weight.abs().amax() / 127
        self.weight_packed = nn.Parameter((weight / scale).round().to(torch.int8), False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def dense(self) -> Tensor:
        return self.weight_packed.to(self.weight_scale.dtype) * self.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), self.bias)


class FP8(nn.Linear):
    """transformers' ``FP8Linear``: an ``nn.Linear`` with a float8 weight and ``weight_scale_inv``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.bias = linear.bias
        weight = linear.weight.detach()
        scale = weight.abs().amax() / 448
        self.weight = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def dense(self) -> Tensor:
        return self.weight.to(self.weight_scale_inv.dtype) * self.weight_scale_inv

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), self.bias)


LAYERS: dict[str, tuple[type[Any], str, str]] = {
    # name: class, what its library calls it, what reports say
    "gptq": (GPTQ, "gptqmodel.nn_modules.TorchQuantLinear", "gptqmodel, 4 bit"),
    "awq": (AWQ, "awq.modules.linear.WQLinear_GEMM", "AWQ, 4 bit"),
    "eetq": (EETQ, "eetq.modules.EetqLinear", "EETQ, 8 bit"),
    "aqlm": (AQLM, "aqlm.inference.QuantizedLinear", "AQLM"),
    "compressed": (
        Compressed,
        "compressed_tensors.linear.compressed_linear.CompressedLinear",
        "compressed-tensors",
    ),
    "fp8": (FP8, "transformers.integrations.finegrained_fp8.FP8Linear", "transformers FP8, 8 bit float"),
}  # fmt: skip


def layer(name: str, linear: nn.Linear) -> Any:
    """The linear layer quantised, in a class of the library's own name."""
    cls, full, _ = LAYERS[name]
    module, _, own = full.rpartition(".")
    return type(own, (cls,), {"__module__": module})(linear)


def replaced(model: nn.Module, name: str, wanted: tuple[str, ...]) -> nn.Module:
    """The model with its linear layers of these names quantised."""
    for path, module in list(model.named_modules()):
        parent, _, last = path.rpartition(".")
        if isinstance(module, nn.Linear) and last in wanted:
            setattr(model.get_submodule(parent), last, layer(name, module))
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with ``nn.Linear``s of the very weights that its quantised layers multiply by."""
    for path, module in list(model.named_modules()):
        parent, _, last = path.rpartition(".")
        if hasattr(module, "dense"):
            out, inside = module.dense().shape
            plain = nn.Linear(inside, out, bias=module.bias is not None)
            plain.weight = nn.Parameter(module.dense().detach().clone(), requires_grad=False)
            plain.bias = module.bias
            setattr(model.get_submodule(parent), last, plain)
    return model
