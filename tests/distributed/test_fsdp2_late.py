"""Models that are adapted, or get another adapter, after ``fully_shard``: the library reduces the gradients."""

from typing import Any

import peft
import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

import vera_fx
from benchmarks.traffic import Traffic
from tests.distributed.pair import two_processes
from tests.distributed.test_fsdp2 import mesh, sharded
from tests.distributed.training import (
    adapted,
    assert_trained,
    base,
    batches,
    config,
    mean_loss,
    mine,
    train,
    trained_alone,
    vectors,
)
from tests.helpers import assert_close, fill_vectors

X = batches(1)[0]


@pytest.mark.parametrize("order", ["layers, adapt, root", "all, adapt", "layers, adapt"])
@two_processes
def test_adapted_after_sharding(order: str) -> None:
    model: Any = base()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh())
    if order == "all, adapt":
        fully_shard(model, mesh=mesh())
    vera_fx.adapt(model, config())
    fill_vectors(model)
    if order == "layers, adapt, root":
        fully_shard(model, mesh=mesh())
    with Traffic() as traffic:
        train(model, map(mine, batches()))
    assert_trained(model, trained_alone())
    if (
        order != "layers, adapt, root"
    ):  # one collective of all gradients, with a number for each vector
        assert traffic.numbers["all_reduce"] == 3 * (84 + 14)


@two_processes
def test_an_adapter_added_after_sharding_trains() -> None:
    model, alone = sharded(adapted()), adapted()
    for m in (model, alone):
        train(m, [mine(X) if m is model else X])
        vera_fx.add_adapter(m, "late", config(r=3))
        vera_fx.set_adapter(m, "late")
        with torch.no_grad():
            for parameter in m.vera.adapters["late"].parameters():
                parameter.fill_(0.3)
        train(m, map(mine, batches()) if m is model else batches())
    assert_trained(model, vectors(alone))


@two_processes
def test_accumulated_gradients_of_late_vectors() -> None:
    """The second backward finds the mean of the first in the gradients."""
    model, alone = sharded(base()), adapted()
    vera_fx.adapt(model, config())
    fill_vectors(model)
    first, second = batches(2)
    for m, cut in ((model, mine), (alone, lambda batch: batch)):
        mean_loss(m(cut(first))).backward()
        mean_loss(m(cut(second))).backward()
    expected = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected[name].grad, factor=5, what=name)


@two_processes
def test_other_kinds_of_adapters_after_sharding() -> None:
    """A magnitude starts at the norms of whole weights."""
    fields: dict[str, Any] = {"r": 5, "target_modules": ["up", "down"], "plan": "factored"}
    model, alone = sharded(base()), base()
    for m in (model, alone):
        vera_fx.adapt(m, vera_fx.DVoraConfig(**fields))
    found, expected = vectors(model), vectors(alone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    train(model, map(mine, batches()))
    train(alone, batches())
    assert_trained(model, vectors(alone), factor=5)


@two_processes
def test_pefts_vera_is_not_reduced() -> None:
    """What PEFT does in the same order: every process trains an adapter of its own."""
    model: Any = base()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    targets = config().target_modules
    theirs = peft.get_peft_model(model, peft.VeraConfig(r=5, target_modules=list(targets or ())))
    fill_vectors(theirs)
    train(theirs, map(mine, batches()))
    value = torch.cat(
        [p.detach().flatten() for _, p in theirs.named_parameters() if p.requires_grad]
    )
    both = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(both, value)
    assert (both[0] - both[1]).abs().max() > 1e-2


@two_processes
def test_a_backward_that_failed_leaves_nothing_behind() -> None:
    model = sharded(base())
    vera_fx.adapt(model, config())
    fill_vectors(model)
    loss = mean_loss(model(failing(mine(X).clone().requires_grad_())))
    with pytest.raises(RuntimeError, match="on purpose"):
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone())


def failing(x: torch.Tensor) -> torch.Tensor:
    """The same values, whose gradient is an error: the last one, when all vectors have theirs."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(_ctx: Any, *_: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("on purpose")

    return Failing.apply(x)
