"""A user's own fused layer: registered, adapted, and forgotten again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors, vectors_of


class FusedLinear(nn.Module):
    """Widths under names of its own, and a kernel of its own: a linear map behind a custom function."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = 6, 5
        self.packed = nn.Parameter(torch.randn(6, 5))

    def forward(self, rows: Tensor) -> Tensor:
        return _Fused.apply(rows, self.packed)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return rows @ packed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.saved_tensors[0].T, None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(4, 6), FusedLinear()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(torch.tanh(self.first(x)))


CONFIG = vera_fx.VeraConfig(r=3, target_modules=["first", "own"])
X = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))


def expected(model: nn.Module) -> Tensor:
    """The branch by its definition, beside the layer."""
    (pair,) = model.vera.projections.values()

    def branch(path: str, x: Tensor, out: int) -> Tensor:
        own = model.vera.adapter("default").vectors_at(path)
        h = own.vera_lambda_d * (x @ pair.vera_A[:, : x.shape[1]].T)
        return own.vera_lambda_b * (h @ pair.vera_B[:out].T)

    first = F.linear(X, model.first.weight, model.first.bias) + branch("first", X, 6)
    hidden = torch.tanh(first)
    return hidden @ model.own.packed + branch("own", hidden, 5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_registered_layer_is_a_target(compiled: bool, fresh_dynamo: Any) -> None:
    names = {"in_features": "wide", "out_features": "tall", "label": "fused"}
    with vera_fx.register_base_product(FusedLinear, **names):
        model = vera_fx.adapt(Net(), CONFIG)
        fill_vectors(model)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        assert_close(run(X), expected(model), factor=5)
        with vera_fx.disable_adapters(model):
            assert_far_apart(model(X), expected(model))
        own = list(vectors_of(model).values())
        ours = torch.autograd.grad(run(X).square().sum(), own)
        for value, reference in zip(
            ours, torch.autograd.grad(expected(model).square().sum(), own), strict=True
        ):
            assert_close(value, reference, factor=20)
        assert {row.path: row.base for row in vera_fx.explain(model).targets} == {
            "first": "",
            "own": "fused",
        }
        assert not fresh_dynamo["graph_break"]


def test_it_ends_with_the_block() -> None:
    with vera_fx.register_base_product(FusedLinear, in_features="wide", out_features="tall"):
        vera_fx.adapt(Net(), CONFIG)
    with pytest.raises(vera_fx.TargetError, match="'own' is a FusedLinear; only"):
        vera_fx.adapt(Net(), CONFIG)


def test_wrong_words_are_errors() -> None:
    with (
        vera_fx.register_base_product(FusedLinear, in_features="tall", out_features="wide"),
        pytest.raises(vera_fx.TargetError, match="'own' .*cannot multiply"),
    ):
        vera_fx.adapt(Net(), CONFIG)
    with (
        vera_fx.register_base_product(FusedLinear),
        pytest.raises(vera_fx.TargetError, match=r"without in_features.*register_base_product"),
    ):
        vera_fx.adapt(Net(), CONFIG)
    for wrong in (nn.Linear, nn.Module, FusedLinear(), int):
        with pytest.raises(vera_fx.ConfigError, match="register_base_product takes a class"):
            vera_fx.register_base_product(wrong)
