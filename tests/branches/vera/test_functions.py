"""Hand-derived gradients against autograd's, for everything that may ask for one and every rank of input."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import assert_close, kept_tensors, storage_of
from vera_fx.branches.vera.functions import merged_linear, merged_weight, merged_weight_again

I, O, R = 5, 4, 3  # noqa: E741
NAMES = ("x", "weight", "bias", "d", "b")
LEADING = [(), (6,), (2, 3), (2, 1, 3), (0,)]


def tensors(*leading: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    sizes = {"x": (*leading, I), "weight": (O, I), "bias": (O,), "A": (R, I), "B": (O, R)}
    sizes |= {"d": (R,), "b": (O,)}
    generator = torch.Generator().manual_seed(len(leading))
    return {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in sizes.items()}


def ours(x: Tensor, weight: Tensor, bias: Any, keeps_z: bool, **rest: Tensor) -> Tensor:
    z = x.detach() @ rest["A"].T if keeps_z else None
    merged = merged_weight(weight, **rest)
    return merged_linear(x, z, merged, weight, bias, **rest)


def plain(
    x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, d: Tensor, b: Tensor
) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, A) * d, B) * b


@pytest.mark.parametrize("keeps_z", [True, False], ids=["z", "x"])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_of_everything_together(
    keeps_z: bool, leading: tuple[int, ...], has_bias: bool
) -> None:
    check(tensors(*leading), NAMES if has_bias else tuple(n for n in NAMES if n != "bias"), keeps_z)


@pytest.mark.parametrize("keeps_z", [True, False], ids=["z", "x"])
@pytest.mark.parametrize(
    "wanted", [c for n in (1, 2) for c in itertools.combinations(NAMES, n)], ids="-".join
)
def test_gradients_of_some_alone(keeps_z: bool, wanted: tuple[str, ...]) -> None:
    check(tensors(2, 3), wanted, keeps_z)


def check(given: dict[str, Tensor], wanted: tuple[str, ...], keeps_z: bool) -> None:
    values: dict[str, Any] = {n: t.requires_grad_(n in wanted) for n, t in given.items()}
    if "bias" not in wanted:
        values["bias"] = None
    actual, expected = ours(keeps_z=keeps_z, **values), plain(**values)
    assert_close(actual, expected)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    inputs = [values[name] for name in wanted]
    pairs = zip(
        torch.autograd.grad(actual, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    )
    for name, (mine, theirs) in zip(wanted, pairs, strict=True):
        assert_close(mine, theirs, what=name)


def test_what_is_kept_for_backward() -> None:
    given = tensors(2, 3)
    for keeps_z, trains in itertools.product([True, False], [True, False]):
        values = {n: t.detach().requires_grad_(n in {"d", "b"}) for n, t in given.items()}
        values["weight"].requires_grad_(trains)
        kept = kept_tensors(lambda v=values, z=keeps_z: ours(keeps_z=z, **v).sum())
        holds_x = storage_of(values["x"]) in {storage_of(tensor) for tensor in kept}
        assert holds_x is (trains or not keeps_z)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merged_weight_has_the_base_dtype_and_one_rounding(base: torch.dtype) -> None:
    given = tensors(dtype=torch.float32)
    weight = given["weight"].to(base)
    rest = {name: given[name] for name in ("A", "B", "d", "b")}
    merged = merged_weight(weight, **rest)
    E = rest["b"][:, None] * rest["B"] * rest["d"]
    if base == torch.bfloat16:  # as the base's own products take their operands
        exact = weight.double() + E.to(base).double() @ rest["A"].to(base).double()
    else:
        exact = weight.double() + E.double() @ rest["A"].double()
    assert merged.dtype == base
    assert_close(
        merged.double(), exact.to(base).double(), factor=1e5 if base == torch.bfloat16 else 1e4
    )
    assert torch.equal(merged_weight_again(weight, **rest), merged)
    for name in ("d", "b"):
        rest[name].requires_grad_()
    assert not merged_weight(weight.requires_grad_(), **rest).requires_grad


def test_small_vectors_survive_a_half_precision_base() -> None:
    given = tensors(dtype=torch.float32)
    weight = torch.zeros(O, I, dtype=torch.float16)
    d = given["d"] * 1e-4
    merged = merged_weight(weight, given["A"] * 1e4, given["B"], d, given["b"] * 1e-4)
    exact = (given["b"] * 1e-4)[:, None] * given["B"] * d @ (given["A"] * 1e4)
    assert torch.equal(merged, exact.half())


def test_gradients_are_taken_once() -> None:
    values = {n: t.requires_grad_(n in {"x", "d"}) for n, t in tensors(2).items()}
    (grad,) = torch.autograd.grad(
        ours(keeps_z=True, **values).square().sum(), values["x"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiat"):
        torch.autograd.grad(grad.sum(), values["d"])


def test_gradients_over_a_float16_base_keep_the_range_of_the_vectors() -> None:
    given = tensors(6, dtype=torch.float32)
    small = {**given, "A": given["A"] * 1e-8, "d": given["d"] * 1e8}
    halves = {name: small[name].half() for name in ("x", "weight", "bias")}
    values: dict[str, Any] = {**small, **halves}
    values["d"].requires_grad_()
    (grad,) = torch.autograd.grad(ours(keeps_z=False, **values).float().sum(), values["d"])

    exact = given["b"] @ (given["B"] * (given["x"] @ small["A"].T).sum(0))
    assert_close(grad * 1e8, exact * 1e8, factor=1e3)
