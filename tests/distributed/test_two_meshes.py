"""Copies of a model under tensor parallelism: DDP over one dimension of a mesh; FSDP2 there is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import vera_fx
from benchmarks.traffic import Traffic
from tests.distributed.pair import four_processes, two_processes
from tests.distributed.tensor_parallel import PAIRED
from tests.distributed.training import (
    adapted,
    assert_trained,
    base,
    batches,
    config,
    mean_loss,
    train,
    trained_alone,
)
from tests.helpers import assert_close, fill_vectors

X = batches(1)[0]
DIMENSIONS = ("data", "parts")


def parallel(model: nn.Module, mesh: DeviceMesh) -> Any:
    for layer in model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, mesh["parts"], PAIRED)
    return model


def filled(model: nn.Module) -> Any:
    vera_fx.adapt(model, config())
    fill_vectors(model)
    return model


ORDERS: dict[str, Callable[[DeviceMesh], Any]] = {
    "parallel first": lambda mesh: filled(parallel(base(), mesh)),
    "adapted first": lambda mesh: parallel(adapted(), mesh),
}


def copies(model: nn.Module, mesh: DeviceMesh) -> DistributedDataParallel:
    return DistributedDataParallel(model, process_group=mesh["data"].get_group())


def trained_in_copies(order: str, mesh: DeviceMesh) -> None:
    model = copies(ORDERS[order](mesh), mesh)
    count, me = mesh["data"].size(), mesh["data"].get_local_rank()
    train(model, [batch.chunk(count)[me] for batch in batches()])
    assert_trained(model, trained_alone())
    alone = adapted()
    vera_fx.load_adapter_state_dict(alone, vera_fx.adapter_state_dict(model))
    with torch.no_grad():
        assert_close(model(X), alone(X))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["copies", "parts"])
@two_processes
def test_one_dimension_of_one(shape: tuple[int, int], order: str) -> None:
    trained_in_copies(order, init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS))


@pytest.mark.slow
@four_processes
def test_two_copies_of_two_parts() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=DIMENSIONS)
    for order in ORDERS:
        trained_in_copies(order, mesh)


@two_processes
def test_only_vectors_travel_between_copies() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=DIMENSIONS)
    model = copies(ORDERS["parallel first"](mesh), mesh)
    train(model, batches(2))
    loss = mean_loss(model(X))
    with Traffic() as backward:
        loss.backward()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in adapted().parameters() if p.requires_grad)
    parts = sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and "head" not in n
    )
    # Once between the copies, and once over the parts, of which there is one here, with what flows back.
    assert backward.numbers["all_reduce"] == count + parts + 2 * X.numel()


@two_processes
def test_a_mesh_for_ddp_is_refused() -> None:
    """torch then makes frozen weights ones that train, and every process would train its own."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=DIMENSIONS)
    model = DistributedDataParallel(ORDERS["parallel first"](mesh), device_mesh=mesh["data"])
    with pytest.raises(vera_fx.AdapterError, match="process_group=mesh"):
        model(X)
    plain = DistributedDataParallel(adapted(), device_mesh=mesh["data"])
    assert_close(plain(X), adapted()(X))


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["shards", "parts"])
@pytest.mark.parametrize("order", ORDERS)
@two_processes
def test_fully_shard_around_it_is_refused(shape: tuple[int, int], order: str) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)
    model = ORDERS[order](mesh)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    with pytest.raises(vera_fx.TargetError, match="only one of them is known to work"):
        fully_shard(model, mesh=mesh["data"])(X)
