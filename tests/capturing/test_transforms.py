"""Targets that a model calls inside of a transform of torch.func run in Python, with their branches."""

import copy

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import fill_vectors, vectors_of
from vera_fx._torch import is_transformed


class Rows(nn.Module):
    """Two layers, over the rows of a batch at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 10)
        self.b = nn.Linear(10, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class OneByOne(Rows):
    """The same by ``torch.vmap``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward)(x)


class Beside(Rows):
    """A transform that calls no target."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.vmap(lambda row: row.sum())(x)[:, None, None]


def pair(other: type[Rows]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Rows()
    config = vera_fx.VeraConfig(r=3, target_modules=["a", "b"], d_initial=0.3)
    adapted = vera_fx.adapt(copy.deepcopy(plain), config)
    twin = other()
    twin.load_state_dict(plain.state_dict())
    twin = vera_fx.adapt(twin, config)
    fill_vectors(adapted)
    fill_vectors(twin)
    return adapted, twin


def trained(model: nn.Module) -> list[nn.Parameter]:
    return list(vectors_of(model).values())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_targets_under_vmap(compiled: bool) -> None:
    expected, model = pair(OneByOne)
    x = torch.randn(2, 4, 6)
    run = torch.compile(model) if compiled else model
    with pytest.warns(vera_fx.PartialCaptureWarning, match="vmap.* the call of 'a'"):
        found = run(x)
    right = expected(x)
    torch.testing.assert_close(found, right)
    for one, two in zip(
        torch.autograd.grad(right.square().sum(), trained(expected)),
        torch.autograd.grad(found.square().sum(), trained(model)),
        strict=True,
    ):
        torch.testing.assert_close(two, one)
        assert two.abs().max() > 0


def test_the_report_says_why_it_runs_in_python() -> None:
    _, model = pair(OneByOne)
    with pytest.warns(vera_fx.PartialCaptureWarning):
        model(torch.randn(2, 4, 6))
    assert "torch.func transforms" in str(vera_fx.explain(model))


def test_a_transform_beside_the_targets_is_captured() -> None:
    expected, model = pair(Beside)
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(model(x), expected(x) * x.sum((1, 2))[:, None, None])
    assert "torch.func transforms" not in str(vera_fx.explain(model))


def test_what_is_inside_of_a_transform_is_known() -> None:
    seen: list[bool] = []
    torch.vmap(lambda row: (seen.append(is_transformed(row)), row)[1])(torch.ones(2, 3))
    assert seen == [True]
    assert not is_transformed(torch.ones(2))
