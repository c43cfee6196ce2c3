"""What is known of the libraries that make quantised layers: their names, bits, and ways to write a weight.

Everything else about such a layer is found by its structure (`opaque`). Nothing here imports a library:
a layer of it exists only where it is imported already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vera_fx.products import bitsandbytes_layers
from vera_fx.products.opaque import registered_product
from vera_fx.products.writing import hqq_layers, quanto_layers, torchao_weights
from vera_fx.products.writing.rewriting import Rewriting


@dataclass(frozen=True, slots=True)
class Backend:
    """One make of quantised layers.

    Attributes:
        name: of the library.
        layers: ``module.Class`` of its layers, or of the class of their weights.
        bits: reads off a layer how its weight is stored, in words.
        rewriting: how a changed weight is written back; None where no way is known.
        tested: whether the suite runs the library itself, or a stand-in of its interface.
    """

    name: str
    layers: tuple[str, ...]
    bits: Callable[[Any], str]
    rewriting: Rewriting | None = None
    tested: bool = False


def _of(*names: str, default: str = "") -> Callable[[Any], str]:
    """Reads the number of bits from the first of these attributes."""

    def bits(module: Any) -> str:
        found = next((value for name in names if (value := getattr(module, name, None))), None)
        return f"{found} bit" if found is not None else default

    return bits


def _bnb_4bit(module: Any) -> str:
    kind = getattr(module.weight, "quant_type", "")
    double = ", double quantisation" if getattr(module.weight, "compress_statistics", False) else ""
    return f"4 bit {kind.upper()}{double}"


def _weight_type(module: Any) -> str:
    return type(module.weight.data).__name__


def _quanto(module: Any) -> str:
    activations = getattr(module, "activation_qtype", None)
    also = "" if activations is None else f", activations {activations.name}"
    return f"{module.weight_qtype.name}{also}"


def _hqq(module: Any) -> str:
    return f"{module.meta['nbits']} bit" if getattr(module, "meta", None) else ""


BACKENDS = (
    Backend(
        "bitsandbytes",
        ("bitsandbytes.Linear8bitLt",),
        lambda _: "8 bit",
        bitsandbytes_layers.REWRITING_8BIT,
        tested=True,
    ),
    Backend(
        "bitsandbytes",
        ("bitsandbytes.Linear4bit",),
        _bnb_4bit,
        bitsandbytes_layers.REWRITING_4BIT,
        tested=True,
    ),
    Backend("torchao", ("torchao.*",), _weight_type, torchao_weights.REWRITING, tested=True),
    Backend("hqq", ("hqq.HQQLinear",), _hqq, hqq_layers.REWRITING, tested=True),
    Backend("optimum-quanto", ("optimum.QLinear",), _quanto, quanto_layers.REWRITING, tested=True),
    Backend(
        "gptqmodel",
        ("gptqmodel.BaseQuantLinear", "gptqmodel.*QuantLinear"),
        _of("bits", "w_bit"),
    ),
    Backend(
        "AWQ", ("awq.WQLinear_GEMM", "awq.WQLinear_GEMV"), _of("w_bit", "bits", default="4 bit")
    ),
    Backend("EETQ", ("eetq.EetqLinear",), lambda _: "8 bit"),
    Backend("AQLM", ("aqlm.QuantizedLinear",), _of("nbits_per_codebook")),
    Backend("compressed-tensors", ("compressed_tensors.CompressedLinear",), _of("num_bits")),
    Backend("transformers FP8", ("transformers.FP8Linear",), lambda _: "8 bit float"),
)
"""The first that a layer belongs to counts; what belongs to none is called all the same."""


def backend_of(module: nn.Module) -> Backend | None:
    """The library that made a layer; None if the table does not know it."""
    weight = module._parameters.get("weight")
    classes = [*type(module).__mro__, *(type(weight.data).__mro__ if weight is not None else ())]
    names = [(cls.__module__.partition(".")[0], cls.__name__) for cls in classes]
    return next((b for b in BACKENDS if any(_matches(b, *name) for name in names)), None)


def _matches(backend: Backend, library: str, name: str) -> bool:
    for layer in backend.layers:
        of, _, wanted = layer.partition(".")
        if library == of and (
            name == wanted or (wanted[0] == "*" and name.endswith(wanted.lstrip("*")))
        ):
            return True
    return False


def describe(module: nn.Module) -> str:
    """Which library a layer comes from, and in how many bits its weight is; for reports."""
    known = registered_product(module)
    if known is not None:
        return known.name
    backend = backend_of(module)
    if backend is None:
        return type(module).__name__
    bits = backend.bits(module)
    return f"{backend.name}{', ' * bool(bits)}{bits}"
