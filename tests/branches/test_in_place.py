"""Models that change the output of an adapted layer in place, under every plan."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import (
    assert_close,
    assert_far_apart,
    assert_same_gradients,
    fill_vectors,
    gradients,
    hook_reference,
    input_gradient,
)


def scaled(y: Tensor) -> Tensor:
    return y.mul_(1.5)


def rectified(y: Tensor) -> Tensor:
    return torch.relu_(y)


def masked(y: Tensor) -> Tensor:
    y[..., 1] = 0.25
    return y


def filled(y: Tensor) -> Tensor:
    return y.masked_fill_(y > 0.5, 0.1)


class InPlace(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 5)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.second(self.change(self.first(x))))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6), (2, 3, 4, 6), (2, 0, 6)], ids=str)
@pytest.mark.parametrize("change", [scaled, rectified, masked, filled])
@pytest.mark.parametrize("plan", ["factored", "scaled", "merged", "dense"])
def test_outputs_of_sites_are_changed_in_place(
    plan: str, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    base = InPlace(change)
    x = torch.randn(shape)
    config = vera_fx.VeraConfig(r=4, target_modules=["first", "second"], plan=plan)
    model = vera_fx.adapt(copy.deepcopy(base), config)
    fill_vectors(model)
    oracle = hook_reference(base, model)

    assert_close(model(x), oracle(x), factor=4)
    if x.numel():
        assert_far_apart(model(x), base(x))
        assert_close(input_gradient(model, x), input_gradient(oracle, x), factor=10)
        expected = gradients(model, lambda _: oracle(x))
        assert_same_gradients(gradients(model, _call(x)), expected, factor=20)


@pytest.mark.parametrize("plan", ["merged", "dense"])
def test_outputs_of_sites_are_changed_in_place_compiled(plan: str) -> None:
    torch.manual_seed(0)
    base = InPlace(masked)
    x = torch.randn(2, 4, 6)
    config = vera_fx.VeraConfig(r=4, target_modules=["first", "second"], plan=plan)
    model = vera_fx.adapt(copy.deepcopy(base), config)
    fill_vectors(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)

    assert_close(compiled(x), hook_reference(base, model)(x), factor=4)
    assert_same_gradients(gradients(model, lambda _: compiled(x)), gradients(model, _call(x)))


def _call(x: Tensor) -> Callable[[nn.Module], Any]:
    return lambda model: model(x)


def test_hubert_trains_with_spec_augment() -> None:
    """Its default configuration masks the output of the feature projection in place."""
    from transformers import HubertConfig, HubertModel

    torch.manual_seed(0)
    base = HubertModel(
        HubertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8, 8),
            conv_kernel=(4, 4),
            conv_stride=(2, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.5,
            mask_time_length=2,
        )
    )
    config = vera_fx.VeraConfig(r=4, target_modules=["projection", "q_proj"], plan="merged")
    model = vera_fx.adapt(base, config)
    x = torch.randn(2, 200)
    mask = torch.zeros(2, 48, dtype=torch.bool)
    mask[:, 3:7] = True
    with pytest.warns(vera_fx.PartialCaptureWarning):
        result = model(x, mask_time_indices=mask)
    result.last_hidden_state.square().sum().backward()

    grads = [p.grad for p in model.vera.parameters()]
    assert grads
    assert all(g is not None for g in grads)
