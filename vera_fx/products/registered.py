"""Modules of other libraries, or of a user: what to say of them so that they can be adapted."""

from torch import nn

from vera_fx._context import Registration
from vera_fx.errors import ConfigError
from vera_fx.products.opaque import PRODUCTS, RegisteredProduct


def register_base_product(
    cls: type[nn.Module],
    *,
    in_features: str = "in_features",
    out_features: str = "out_features",
    compute_dtype: str | None = None,
    label: str | None = None,
) -> Registration:
    """Let modules of a class be targets: one tensor ``(*L, in)`` in, one ``(*L, out)`` out.

    Graphs call such a module as it is, and add the branch beside it. Its weight is never read, so that
    the plans are ``factored`` and ``scaled``. Linear modules over quantised weights need no
    registration where they have the usual attributes.

    Args:
        cls: the class; those derived from it count as well.
        in_features: the attribute that holds the width of the input.
        out_features: likewise of the output.
        compute_dtype: the attribute that holds the dtype that it computes in; else its weight's.
        label: what reports call it; None for the name of the class.

    Returns:
        What ends it: ``with register_base_product(...)``, or ``.remove()``.

    Raises:
        ConfigError: ``cls`` is no class of modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"register_base_product takes a class of torch.nn.Module, got {cls!r}")
    if cls in (nn.Module, nn.Linear):
        raise ConfigError(f"register_base_product takes a class of your own, not {cls.__name__}")
    product = RegisteredProduct(label or cls.__name__, (in_features, out_features), compute_dtype)
    return Registration(PRODUCTS, cls, product)
