"""Gradient checkpointing over the parts of a model that runs in Python: the backward runs their graphs."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vera_fx
from tests.helpers import assert_close, fill_vectors
from tests.model.test_parts import CONFIG, Block

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


class Halting(nn.Module):
    """Stops where values have grown, and checkpoints its blocks if it is told to."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head, self.gate = nn.Linear(6, 5), nn.Linear(6, 1)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            plain = self.reentrant is None
            x = block(x) if plain else checkpoint(block, x, use_reentrant=self.reentrant)
            if self.gate(x).abs().mean() * 0 + x.abs().mean() > 50:
                break
        return self.head(x)


def gradients(reentrant: bool | None, plan: str) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = vera_fx.adapt(Halting(reentrant).eval(), CONFIG.replace(plan=plan))
    fill_vectors(model)
    x = X.clone().requires_grad_()
    with pytest.warns(vera_fx.PartialCaptureWarning):
        y = model(x)
    y.square().sum().backward()
    assert len(list(model.__dict__["_vera_runtime"].all_captures())) == 3
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", ["factored", "merged", "dense"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpoints(reentrant: bool, plan: str) -> None:
    expected, plain = gradients(None, plan)
    found, checkpointed = gradients(reentrant, plan)
    assert_close(found, expected)
    assert plain.keys() == checkpointed.keys()
    assert (
        len(plain) == 14
    )  # d and b of six sites in blocks, and of the head; the gate decides only
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        assert_close(checkpointed[name], gradient, factor=5, what=name)


def test_a_part_that_outlives_its_model_is_what_it_was() -> None:
    torch.manual_seed(0)
    model = vera_fx.adapt(Halting(None).eval(), CONFIG)
    with pytest.warns(vera_fx.PartialCaptureWarning):
        model(X)
    block, gone = model.blocks[0], weakref.ref(model)
    plain = copy.deepcopy(block)
    del model
    gc.collect()
    assert gone() is None
    x = X.clone().requires_grad_()
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert type(plain) is Block
