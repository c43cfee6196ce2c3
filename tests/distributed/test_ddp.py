"""DistributedDataParallel over an adapted model: two processes train what one does on the whole batch."""

from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import vera_fx
from benchmarks.traffic import Traffic
from tests.distributed.pair import two_processes
from tests.distributed.training import (
    CLASSES,
    HIDDEN,
    RANK,
    WIDTH,
    Checkpointed,
    Net,
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"broadcast_buffers": False},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@two_processes
def test_two_train_what_one_does(options: dict[str, Any]) -> None:
    model = DistributedDataParallel(adapted(), **options)
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone())


@pytest.mark.parametrize("plan", ["merged", "scaled", "dense"])
@two_processes
def test_every_plan(plan: str) -> None:
    model = DistributedDataParallel(adapted(plan=plan))
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone(plan=plan), factor=5)


@pytest.mark.parametrize("order", ["compile first", "compile last", "module.compile"])
@two_processes
def test_compiled(order: str) -> None:
    torch._dynamo.reset()
    inner: Any = adapted()
    if order == "compile first":
        inner = torch.compile(inner, backend="aot_eager", fullgraph=True)
    elif order == "module.compile":
        inner.compile(backend="aot_eager", fullgraph=True)
    model: Any = DistributedDataParallel(inner)
    if order == "compile last":
        model = torch.compile(model, backend="aot_eager")
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone(), factor=5)
    assert vera_fx.adapter_names(model) == ["default"]


@two_processes
def test_trained_heads_travel_too() -> None:
    fields = {"target_modules": ["up", "down"], "modules_to_save": ["head"]}
    model = DistributedDataParallel(adapted(**fields))
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone(**fields))


@two_processes
def test_accumulated_steps() -> None:
    """Two batches a step, the first without synchronisation."""
    model, data = DistributedDataParallel(adapted()), batches(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for first, second in zip(data[::2], data[1::2], strict=True):
        with model.no_sync():
            (mean_loss(model(mine(first))) / 2).backward()
        (mean_loss(model(mine(second))) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = [torch.cat(pair) for pair in zip(data[::2], data[1::2], strict=True)]
    assert_trained(model, trained_alone(pairs), factor=2)


@two_processes
def test_uneven_numbers_of_batches() -> None:
    """The one that has run out joins in with nothing: gradients are divided by all processes."""
    model, data = DistributedDataParallel(adapted()), batches(3)
    with Join([model]):
        train(model, [mine(batch) for batch in data[: 2 + dist.get_rank()]])
    alone = adapted()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.02)
    for step, batch in enumerate(data):
        halves = batch.chunk(2)[step // 2 :]
        (sum(mean_loss(alone(half)) for half in halves) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in vectors(model).items():
        assert_close(value, vectors(alone)[name], what=name)


@two_processes
def test_gradient_checkpointing() -> None:
    inner = base()
    inner.__class__ = Checkpointed
    model = vera_fx.adapt(inner, config())
    fill_vectors(model)
    wrapped = DistributedDataParallel(model)
    train(wrapped, map(mine, batches()))
    assert_trained(wrapped, trained_alone())


@two_processes
def test_bytes_of_a_step() -> None:
    """Gradients of vectors, and buffers of the base's own; neither A and B nor base weights."""
    model = DistributedDataParallel(adapted())
    data = [mine(batch) for batch in batches()]
    train(model, data[:2])  # then the processes have agreed on buckets
    with Traffic() as traffic:
        train(model, data[2:])
    count = 7 * RANK + 3 * (HIDDEN + WIDTH) + CLASSES
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # All of it float32: 336 bytes and 12.
    assert traffic.numbers == {"all_reduce": count, "broadcast": model.module.scale.numel()}


@two_processes
def test_what_the_user_ignores_stays_ignored() -> None:
    model = adapted()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["scale"])
    wrapped = DistributedDataParallel(model)
    shared = {"vera.projections.0.vera_A", "vera.projections.0.vera_B"}
    assert wrapped.parameters_to_ignore == {"scale", *shared}
    assert isinstance(vera_fx.unload(wrapped), Net)
    assert type(model) is Net
    assert model._ddp_params_and_buffers_to_ignore == ["scale"]
