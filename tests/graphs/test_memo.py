"""Graphs are kept by all that decides how a call is computed, and chosen anew when it changes."""

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import fill_adapters

X = torch.randn(600, 64, generator=torch.Generator().manual_seed(1))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def plans(model: nn.Module) -> list[str]:
    """The plan of every graph, in the order in which they were made."""
    return [plan for graph in vera_fx.explain(model).graphs for _, plan, _ in graph.plans]


def chosen(rank: int) -> str:
    """The plan for an adapter of this rank that is alone on its model."""
    torch.manual_seed(0)
    model = vera_fx.adapt(Wide(), vera_fx.VeraConfig(r=rank, target_modules=["lin"]))
    model(X)
    return plans(model)[0]


def test_the_first_adapters_plan_does_not_serve_the_others() -> None:
    small, large = chosen(2), chosen(512)
    assert small != large
    torch.manual_seed(0)
    model = vera_fx.adapt(Wide(), vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    vera_fx.add_adapter(model, "large", vera_fx.VeraConfig(r=512, target_modules=["lin"]))
    fill_adapters(model)
    for name in ("default", "large", "default"):
        vera_fx.set_adapter(model, name)
        model(X)

    assert plans(model) == [small, large]


def test_what_trains_is_planned_anew() -> None:
    torch.manual_seed(0)
    model = vera_fx.adapt(Wide(), vera_fx.VeraConfig(r=64, target_modules=["lin"]))
    model(X)
    runtime = model.__dict__["_vera_runtime"]
    known = len(runtime.kept._known)
    vera_fx.set_trainable(model, "default", trainable=False)
    model(X)

    assert len(runtime.kept._known) == known + 1
    assert len(list(runtime.all_captures())) == 1


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_autocast_of_every_device_is_told_apart(kind: str) -> None:
    torch.manual_seed(0)
    model = vera_fx.adapt(Wide(), vera_fx.VeraConfig(r=4, target_modules=["lin"]))
    model(X)
    before = torch.is_autocast_enabled(kind)
    torch.set_autocast_enabled(kind, True)
    try:
        assert model(X).dtype == (torch.bfloat16 if kind == "cpu" else torch.float32)
    finally:
        torch.set_autocast_enabled(kind, before)
    assert len(list(model.__dict__["_vera_runtime"].all_captures())) == 2
    assert model(X).dtype == torch.float32
