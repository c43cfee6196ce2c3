"""Calls that change nothing are not looked at again: the watch costs a compiled step next to nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.models import llama, text_inputs
from vera_fx.capturing.state_watch import StateWatch


@torch.compiler.disable
def doubled(x: Tensor) -> Tensor:
    return x + x


class Decorated(nn.Module):
    """Its forward may read a function that a decorator of torch's wraps, with torch's globals."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        return doubled(self.lin(x)) if twice else self.lin(x)


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    return RobertaModel(config, add_pooling_layer=False)


def ids() -> dict[str, Tensor]:
    return {name: value for name, value in text_inputs().items() if name != "labels"}


MODELS = {
    "decorated": (Decorated, lambda: {"x": torch.randn(3, 4)}),
    "roberta": (roberta, ids),
    "llama": (llama, ids),
}


@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps_find_everything_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: Any
) -> None:
    build, inputs = MODELS[name]
    model = vera_fx.adapt(build(), vera_fx.VeraConfig(r=2, target_modules="all-linear"))
    compiled = torch.compile(model, backend="eager")

    def step() -> None:
        output = compiled(**inputs())
        (output if isinstance(output, Tensor) else output[0]).sum().backward()
        model.zero_grad()

    for _ in range(3):
        step()
    looks: list[StateWatch] = []
    look = StateWatch._look
    monkeypatch.setattr(StateWatch, "_look", lambda self: (looks.append(self), look(self)))
    for _ in range(3):
        step()
    assert not looks
