"""Torch's tensor parallelism: column- and row-wise layers, each compared with one process and whole weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.tensor_parallel import PAIRED, WHOLE, adapted_parallel, parallel
from tests.distributed.training import (
    adapted,
    assert_trained,
    base,
    batches,
    mean_loss,
    train,
    trained_alone,
)
from tests.helpers import assert_close, assert_far_apart, fill_vectors, gradients, vectors_of

X = batches(1)[0]
LAYOUTS = {"paired": PAIRED, "whole": WHOLE}


def equal_everywhere(value: Tensor) -> bool:
    others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(others, value.contiguous())
    return all(torch.equal(other, value) for other in others)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("plan", ["factored", "scaled"])
@two_processes
def test_outputs_gradients_and_steps(layouts: str, plan: str) -> None:
    model, alone = adapted_parallel(LAYOUTS[layouts], plan=plan), adapted(plan=plan)
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    outputs = [net(x) for net, x in zip((model, alone), inputs, strict=True)]
    assert_close(*outputs)
    with vera_fx.disable_adapters(model):
        assert_far_apart(model(X), outputs[1])
    for output in outputs:
        mean_loss(output).backward()
    assert_close(inputs[0].grad, inputs[1].grad, what="input")
    own, expected = vectors_of(model), vectors_of(alone)
    assert own.keys() == expected.keys()
    for name, vector in own.items():
        assert_close(vector.grad, expected[name].grad, what=name)
        assert equal_everywhere(vector.grad), f"the gradient of {name} differs between ranks"
        vector.grad = None
    train(model, batches())
    assert_trained(model, trained_alone(plan=plan))


@two_processes
def test_without_gradients() -> None:
    model, alone = adapted_parallel().eval(), adapted().eval()
    with torch.no_grad():
        assert_close(model(X), alone(X))
        assert_close(model(X[:3]), alone(X[:3]))
    with torch.inference_mode():
        assert_close(model(X), alone(X))


@pytest.mark.parametrize("calls_before", [False, True])
@two_processes
def test_after_adapting(calls_before: bool) -> None:
    """Vectors and projections are whole in either order."""
    model: Any = adapted()
    if calls_before:
        model(X)
    parallel(model)
    assert_close(model(X), adapted()(X))
    train(model, batches())
    assert_trained(model, trained_alone())


EVEN = {"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}
"""Torch's own hooks take no columns that two do not divide."""


@pytest.mark.parametrize("order", ["parallel first", "adapted first"])
@pytest.mark.parametrize("layouts", LAYOUTS)
@two_processes
def test_calls_past_the_forward(layouts: str, order: str) -> None:
    """Hooks compute the branch where modules are called by others than the model's own forward."""
    wanted = vera_fx.VeraConfig(r=5, target_modules=["up", "down"])
    found: list[Any] = []
    for first in (True, False):
        model = base()
        for layer in model.layers:  # type: ignore[union-attr]
            layer._modules.update(copy.deepcopy(EVEN))
        if first and order == "parallel first":
            parallel(model, LAYOUTS[layouts])
        fill_vectors(vera_fx.adapt(model, wanted))
        if first and order == "adapted first":
            parallel(model, LAYOUTS[layouts])
            model(X)
        found.append(model)
    inputs = [X.clone().requires_grad_() for _ in found]
    outputs = [net.layers[0](x) for net, x in zip(found, inputs, strict=True)]
    assert_close(*outputs)
    for net, output in zip(found, outputs, strict=True):
        mean_loss(output).backward()
        del net
    assert_close(inputs[0].grad, inputs[1].grad)
    for name, vector in vectors_of(found[0]).items():
        if "layers.0" in name:
            assert_close(vector.grad, vectors_of(found[1])[name].grad, what=name)


@pytest.mark.parametrize("plan", ["factored", "scaled"])
@two_processes
def test_half_precision(plan: str) -> None:
    def halved(model: Any) -> Any:
        return vera_fx.adapt(
            model, vera_fx.VeraConfig(r=5, target_modules=["up", "down"], plan=plan)
        )

    nets = (halved(parallel(base(torch.bfloat16))), halved(base(torch.bfloat16)))
    exact = halved(base(torch.bfloat16).float())
    for net in (*nets, exact):
        with torch.no_grad():
            for vector in vectors_of(net).values():
                vector.copy_(torch.linspace(0.5, 1.0, len(vector)))
    assert nets[0](X.bfloat16()).dtype == torch.bfloat16
    x = X.bfloat16()
    ours, alone = (gradients(net, lambda m: m(x)) for net in nets)
    expected = gradients(exact, lambda m: m(x.float()))
    assert len(expected) == 12
    errors = [
        (torch.cat([found[name] - value for name, value in expected.items()])).norm()
        for found in (ours, alone)
    ]
    assert errors[0] < 1.5 * errors[1]  # what rounding does to one process
    assert errors[1] < 0.1 * torch.cat(list(expected.values())).norm()
    outputs = [(net(x).float() - exact(x.float())).norm() for net in nets]
    assert outputs[0] < 1.5 * outputs[1]


@two_processes
def test_switching_adding_deleting() -> None:
    model, alone = adapted_parallel(), adapted()
    for net in (model, alone):
        vera_fx.add_adapter(net, "other", vera_fx.VeraConfig(r=3, target_modules=["up"]))
        with torch.no_grad():
            for name, vector in vectors_of(net).items():
                if "other" in name:
                    vector.copy_(torch.linspace(-1, 1, len(vector)))
    both = [model(X)]
    for names in ("other", ["default", "other"], "default"):
        for net in (model, alone):
            vera_fx.set_adapter(net, names)
        both.append(model(X))
        assert_close(both[-1], alone(X))
    assert_far_apart(both[1], both[0])
    assert torch.equal(both[0], both[3])
    vera_fx.delete_adapter(model, "other")
    assert torch.equal(model(X), both[0])


@two_processes
def test_gradients_of_gradients() -> None:
    found: list[list[Tensor]] = []
    for net in (adapted_parallel(), adapted()):
        vectors = list(vectors_of(net).values())
        first = torch.autograd.grad(mean_loss(net(X)), vectors, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append([v.detach() for v in torch.autograd.grad(total, vectors)])  # type: ignore[arg-type]
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, factor=5)
