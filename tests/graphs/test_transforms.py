"""``torch.func`` over adapted models: they run in Python there, with the right numbers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference
from tests.models import MLP

X = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))

TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda m: torch.func.grad(lambda x: m(x).sin().sum())(X),
    "vmap": lambda m: torch.func.vmap(m)(X[:, None]),
    "jvp": lambda m: torch.func.jvp(m, (X,), (X.cos(),))[1],
    "jacrev": lambda m: torch.func.jacrev(m)(X[0]),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("plan", ["factored", "merged"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_right(name: str, plan: str, warm: bool) -> None:
    torch.manual_seed(0)
    base = MLP().eval()
    config = vera_fx.VeraConfig(r=4, target_modules=["lin0", "lin1"], plan=plan)
    model = vera_fx.adapt(copy.deepcopy(base), config)
    fill_vectors(model)
    oracle = hook_reference(base, model)
    if warm:
        model(X)
    found: Tensor = TRANSFORMS[name](model)

    assert_close(found, TRANSFORMS[name](oracle), factor=4)
    assert_far_apart(found, TRANSFORMS[name](base))
    # Afterwards graphs run as before.
    assert_close(model(X), oracle(X), factor=4)
    assert len(vera_fx.explain(model).graphs) == 1
    assert not vera_fx.explain(model).python


def test_a_batch_cannot_mix_adapters_there() -> None:
    model = vera_fx.adapt(MLP().eval(), vera_fx.VeraConfig(r=4, target_modules=["lin0"]))
    names = ["default", "__base__", "default"]
    with pytest.raises(vera_fx.CaptureError, match=r"torch\.func transforms it"):
        torch.func.grad(lambda x: model(x, adapter_names=names).sum())(X)


@pytest.mark.parametrize("plan", ["factored", "merged"])
def test_gradients_of_each_sample(plan: str) -> None:
    """``vmap`` of ``grad`` over ``functional_call``, with respect to the vectors."""
    torch.manual_seed(0)
    model = vera_fx.adapt(
        MLP().eval(), vera_fx.VeraConfig(r=3, target_modules="all-linear", plan=plan)
    )
    fill_vectors(model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(vectors: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, vectors, (x[None],)).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, X)
    live = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for row, x in enumerate(X):
        wanted = torch.autograd.grad(model(x[None]).sin().sum(), list(live.values()))
        for name, expected in zip(live, wanted, strict=True):
            assert expected.abs().sum() > 0
            assert_close(found[name][row], expected, factor=5, what=name)
    assert_far_apart(found[name][0], found[name][1])
