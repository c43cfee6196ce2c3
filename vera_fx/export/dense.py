"""Weights of called modules for graphs that leave the library: dense, and named as their modules' own."""

import warnings
from collections.abc import Mapping

from torch import Tensor, nn
from torch.fx import GraphModule

from vera_fx.bank.slots import Slot
from vera_fx.errors import ExportError, first_line
from vera_fx.export.module import Read
from vera_fx.passes import DenseProducts, called_modules, tensor_of
from vera_fx.products.opaque import dense_weight

_DENSE = "dense"


def dense_products(
    model: nn.Module, graph: GraphModule, folded: Mapping[str, Tensor]
) -> tuple[DenseProducts, dict[str, Read]]:
    """The pass that replaces every call of a module, and what the graph reads after it.

    Args:
        model: the model.
        graph: a graph of its own, on which the weights are put where the pass finds them.
        folded: weights with an adapter in them, by module path; the rest are the modules' own.

    Raises:
        ExportError: a module does not say its weight.

    Warns:
        UserWarning: the program holds dense weights.
    """
    found: dict[str, Tensor] = {}
    for node, path in called_modules(graph):
        if path not in found:
            dtype = tensor_of(node).dtype
            found[path] = folded[path].to(dtype) if path in folded else _dense(model, path, node)
    if found:
        size = sum(weight.numel() * weight.element_size() for weight in found.values())
        warnings.warn(
            f"{len(found)} quantised modules leave as dense weights of {size / 2**20:.1f} MiB: a program "
            "holds plain operators alone. Activations that a library rounds are not rounded there",
            stacklevel=5,
        )
    return _placed(model, graph, found)


def _dense(model: nn.Module, path: str, node: object) -> Tensor:
    module, dtype = model.get_submodule(path), tensor_of(node).dtype  # pyright: ignore
    try:
        return dense_weight(module, dtype).to(dtype)
    except Exception as error:
        raise ExportError(
            f"{path!r}, a {type(module).__name__}, does not say what it multiplies by: {first_line(error)}"
        ) from error


def _placed(
    model: nn.Module, graph: GraphModule, weights: Mapping[str, Tensor]
) -> tuple[DenseProducts, dict[str, Read]]:
    held: dict[str, Tensor] = {}
    reads: dict[str, Read] = {}
    products: list[tuple[str, str, str | None]] = []
    for number, (path, weight) in enumerate(weights.items()):
        bias = getattr(model.get_submodule(path), "bias", None)
        own = {"weight": weight} | (
            {} if bias is None else {"bias": bias.detach().to(weight.dtype)}
        )
        places = {name: f"{_DENSE}.{name}_{number}" for name in own}
        for name, tensor in own.items():
            held[f"{name}_{number}"] = tensor
            reads[places[name]] = Read(f"{path}.{name}", tensor)
        products.append((path, places["weight"], places.get("bias")))
    graph.__dict__[_DENSE] = Slot(held)
    return DenseProducts(tuple(products)), reads
