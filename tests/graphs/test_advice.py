"""Calls that are captured over and over are not suffered in silence."""

import warnings

import pytest
import torch
from torch import nn

import vera_fx


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return self.lin(x) * factor


def test_a_number_that_changes_with_every_call_is_named() -> None:
    model = vera_fx.adapt(Scales(), vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(11):
            model(x, factor=float(step))
        model(x, factor=3.0)  # known
    with pytest.warns(UserWarning, match="12 graphs of Scales.*10.0 -> 11.0"):
        model(x, factor=11.0)
