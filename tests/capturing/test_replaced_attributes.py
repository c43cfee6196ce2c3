"""Another dictionary in the place of an object's attributes is a change like any other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx


class Settings:
    """Numbers under names."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Net(nn.Module):
    """Reads settings two levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 5)
        self.settings = Settings(2.0)
        self.inner = {"deep": Settings(3.0)}

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.settings.scale * self.inner["deep"].scale


CHANGES: dict[str, tuple[Callable[[Any], Any], float]] = {
    "object": (lambda m: m.settings, 2.0),
    "object two levels deep": (lambda m: m.inner["deep"], 3.0),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", CHANGES)
def test_replaced_attributes_are_seen(kind: str, compiled: bool) -> None:
    model: Any = vera_fx.adapt(Net(), vera_fx.VeraConfig(r=3, target_modules=["lin"]))
    run = torch.compile(model) if compiled else model
    find, before = CHANGES[kind]
    x = torch.randn(2, 4)
    expected = run(x)
    run(x)
    for scale in (7.0, 11.0):
        find(model).__dict__ = {"scale": scale}
        torch.testing.assert_close(run(x), expected * scale / before)


def test_another_dictionary_of_a_module() -> None:
    model: Any = vera_fx.adapt(Net(), vera_fx.VeraConfig(r=3, target_modules=["lin"]))
    x = torch.randn(2, 4)
    expected = model(x)
    model(x)
    other = dict(model.lin.__dict__)
    other["_parameters"] = {n: nn.Parameter(2 * p) for n, p in model.lin._parameters.items()}
    model.lin.__dict__ = other
    torch.testing.assert_close(model(x), 2 * expected)
