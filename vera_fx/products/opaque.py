"""Which modules are called rather than read: linear layers over weights that only their own code reads.

How such a layer stores its weight and multiplies by it is its library's affair. One structural rule
finds them, and names no library: own input and output features, no children, and a weight that is
missing, of a dtype that does not compute, or a tensor subclass.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from vera_fx._context import registered
from vera_fx._torch import is_wrapper, outside_modes
from vera_fx.products.protocol import PLAIN

Features = tuple[int, int]
PRODUCTS = "base products"
"""Where `register_base_product` keeps what users have registered."""

_NAMES = (("in_features", "out_features"), ("infeatures", "outfeatures"))


def is_opaque(module: nn.Module) -> bool:
    """True for a linear module that graphs call."""
    if registered_product(module) is not None:
        return True
    if features_of(module) is None or next(module.children(), None) is not None:
        return False
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    if weight is None:
        return not _has_computed_weight(module) and next(tensors_of(module), None) is not None
    if torch.nn.parameter.is_lazy(weight) or type(weight).__name__ == "DTensor":
        return False
    return weight.dtype not in PLAIN or is_wrapper(weight)


def _has_computed_weight(module: nn.Module) -> bool:
    """True where pruning and old-style norms put a weight that is no parameter."""
    return isinstance(vars(module).get("weight"), Tensor)


def registered_product(module: nn.Module) -> "RegisteredProduct | None":
    """What a user has said of the module's class, or of the nearest class that it is derived from."""
    known = registered(PRODUCTS)
    if not known:
        return None
    return next((known[cls] for cls in type(module).__mro__ if cls in known), None)


class RegisteredProduct:
    """How to read the modules of a class that `vera_fx.register_base_product` was told of."""

    def __init__(self, name: str, sizes: tuple[str, str], dtype: str | None) -> None:
        self.name, self.sizes, self.dtype = name, sizes, dtype

    def features(self, module: nn.Module) -> Features | None:
        """``(in, out)``, if the module has both as whole numbers."""
        return _sizes(module, self.sizes)


def features_of(module: nn.Module) -> Features | None:
    """``(in, out)`` as the module itself says it; None if it says none."""
    known = registered_product(module)
    if known is not None:
        return known.features(module)
    return next((found for names in _NAMES if (found := _sizes(module, names))), None)


def _sizes(module: nn.Module, names: tuple[str, str]) -> Features | None:
    sizes = tuple(getattr(module, name, None) for name in names)
    return cast("Features", sizes) if all(type(size) is int for size in sizes) else None


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The module's own parameters, then its buffers."""
    for held in (module._parameters, module._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)


def place_of_module(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype that new vectors are rounded through, and where the module is.

    PEFT's rule (``BaseTunerLayer._get_base_layer_device_and_dtype``): the module's ``compute_dtype``, or
    its weight's if that computes; nothing is rounded where it has no ``weight`` or ``qweight`` (HQQ).
    """
    held = [getattr(module, name, None) for name in ("weight", "qweight")]
    weight = next((tensor for tensor in held if isinstance(tensor, Tensor)), None)
    known = registered_product(module)
    if weight is None and known is None:
        return torch.float32, _device(module)
    asked = _asked(module)
    dtypes = [asked] if asked is not None else [] if weight is None else [weight.dtype]
    return next((dtype for dtype in dtypes if dtype in PLAIN), torch.float32), _device(module)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that the module can be asked in: what it says, else that of its first tensor that computes."""
    asked = _asked(module)
    dtypes = [tensor.dtype for tensor in tensors_of(module)]
    return next((d for d in (asked, *dtypes) if d in PLAIN), torch.float32)


def _asked(module: nn.Module) -> torch.dtype | None:
    known = registered_product(module)
    asked = getattr(module, (known and known.dtype) or "compute_dtype", None)
    return asked if isinstance(asked, torch.dtype) else None


def _device(module: nn.Module) -> torch.device:
    first = next(tensors_of(module), None)
    return torch.device("cpu") if first is None else first.device


def answer(module: nn.Module, rows: Tensor) -> Tensor:
    """What the module returns for plain rows, in surroundings where nothing is traced.

    Raises:
        Exception: whatever the module raises.
    """
    training = module.training
    try:
        # Some libraries rearrange weights in calls that need no gradient.
        module.training = True
        with outside_modes(), torch.enable_grad():
            return module.forward(rows.detach().requires_grad_())
    finally:
        module.training = training


def dense_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix that the module multiplies by, ``(out, in)``: its answer to every unit vector.

    No library is asked how it stores weights. Exact for those that store them in fewer bits; for
    layers that round their input as well, to that rounding.

    Args:
        module: an opaque module.
        dtype: of the rows that it is asked with; None for the one that it computes in.
    """
    inside = cast("Features", features_of(module))[0]
    units = torch.eye(inside, dtype=dtype or compute_dtype(module), device=_device(module))
    found = answer(module, units).detach()
    bias = getattr(module, "bias", None)
    return (found if bias is None else found - bias.detach().to(found.dtype)).T.contiguous()
