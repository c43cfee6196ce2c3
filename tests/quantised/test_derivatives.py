"""Second derivatives over quantised weights: the plain model of those weights is the reference."""

from typing import Any

import pytest
import torch

import vera_fx
from tests.helpers import assert_close, fill_vectors
from tests.quantised.backends import INPUTS, TARGETS, quantised

# torch's fused attention has no second derivative; int8 of bitsandbytes rounds its gradients.
NAMES = ("nf4", "ao-int8")


def adapted(model: Any, plan: str) -> Any:
    model.set_attn_implementation("eager")
    vera_fx.adapt(model, vera_fx.VeraConfig(r=5, target_modules=TARGETS, plan=plan))
    fill_vectors(model)
    return model


def penalised(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of the squared gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = torch.autograd.grad(model(**INPUTS).loss, list(trained.values()), create_graph=True)
    penalty = torch.stack([(grad**2).sum() for grad in first]).sum()
    return dict(zip(trained, torch.autograd.grad(penalty, list(trained.values())), strict=True))


@pytest.mark.parametrize("plan", ["factored", "scaled"])
@pytest.mark.parametrize("name", NAMES)
def test_as_the_plain_model(name: str, plan: str) -> None:
    model = adapted(quantised(name), plan)
    plain = vera_fx.unload(
        vera_fx.adapt(quantised(name), vera_fx.VeraConfig(r=5, target_modules=TARGETS)), merge=True
    )
    expected = penalised(adapted(plain, "factored"))
    found = penalised(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value.abs().max() > 0
        assert_close(found[key], value, factor=200, what=key)
