"""Kinds of base product: who owns which module, what is refused by `adapt` itself, and a new one."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors, vectors_of
from vera_fx.passes import ReadWeight
from vera_fx.products import kinds
from vera_fx.products.linear import Linear

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Lookalike(torch.Tensor):
    """A tensor subclass whose values are somewhere else, as those of quantisation libraries are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Lookalike":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(func))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Linear(2, 3), "nn.Linear"),
        (nn.MultiheadAttention(4, 2).out_proj, "nn.MultiheadAttention.out_proj"),
        (Conv1D(3, 2), "Conv1D"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), "nn.Linear"),
        (nn.Embedding(2, 3), None),
        (nn.Conv1d(2, 3, 1), None),
    ],
)
def test_every_module_has_one_kind(module: nn.Module, name: str | None) -> None:
    kind = kinds.known_kind(module)

    assert (kind.name if kind else None) == name


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False), "float8_e4m3fn"),
        (lambda w: nn.Parameter(w.to(torch.int8), requires_grad=False), "int8"),
        (lambda w: nn.Parameter(Lookalike(w), requires_grad=False), "of type Lookalike"),
        (lambda w: nn.Parameter(w.reshape(-1, 1, 1), requires_grad=False), r"shape \(30, 1, 1\)"),
        (lambda w: nn.Parameter(w.to_sparse(), requires_grad=False), "whose values only its own"),
    ],
    ids=["float8", "int8", "subclass", "packed", "sparse"],
)
def test_weights_that_are_no_plain_matrices_are_refused(weight: Any, reason: str) -> None:
    model = Net()
    model.lin.weight = weight(model.lin.weight.detach())
    before = dict(model.__dict__)

    with pytest.raises(vera_fx.TargetError, match=f"target 'lin' .*{reason}") as caught:
        vera_fx.adapt(model, vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    assert "leave it out of target_modules" in str(caught.value)
    assert type(model) is Net
    assert model.__dict__.keys() == before.keys()


class Scaled(nn.Module):
    """A product that is no ``nn.Linear``: by a weight that lies the other way round, and scaled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@dataclass(frozen=True, slots=True)
class ScaledKind(Linear):
    """What a file of a new kind of base product holds."""

    @property
    def name(self) -> str:
        return "Scaled"

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, Scaled)

    def product(self, module: nn.Module) -> ReadWeight:
        return ReadWeight("in_out")

    def weight(self, module: nn.Module) -> Tensor:
        return cast("Tensor", module.weight).T


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.lin = Scaled(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(torch.tanh(self.own(x)))


@pytest.mark.parametrize("plan", ["factored", "scaled", "merged", "dense"])
def test_a_new_kind_is_a_file_and_a_line(monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    torch.manual_seed(0)
    base = Mixed()
    config = vera_fx.VeraConfig(r=3, target_modules=["own", "lin"], plan=plan)
    with pytest.raises(vera_fx.TargetError, match="is a Scaled; only nn.Linear, Conv1D"):
        vera_fx.adapt(base, config)
    monkeypatch.setattr(kinds, "KINDS", (ScaledKind(), *kinds.KINDS))
    model = vera_fx.adapt(copy.deepcopy(base), config)
    fill_vectors(model)

    folded = copy.deepcopy(base)
    (pair,) = model.vera.projections.values()
    for path, weight in (("own", folded.own.weight.T), ("lin", folded.lin.weight)):
        vectors = model.vera.adapter("default").vectors_at(path)
        left = vectors.vera_lambda_b[:, None] * pair.vera_B[: len(weight)]
        weight.data.add_(
            left @ (vectors.vera_lambda_d[:, None] * pair.vera_A[:, : weight.shape[1]])
        )
    assert_close(model(X), folded(X), factor=5)
    assert_far_apart(model(X), base(X))
    model(X).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in vectors_of(model).values())
    vera_fx.merge(model)
    assert_close(model.own.weight, folded.own.weight, factor=5)
    assert_close(vera_fx.unload(model)(X), base(X), factor=5)
