"""Tensor parallelism is refused, whichever comes first: branches are made for whole weights."""

import pytest
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.training import adapted, base, batches, config

X = batches(1)[0]
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


@two_processes
def test_before_adapting() -> None:
    model, mesh = base(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        parallelize_module(layer, mesh, PLAN)
    with pytest.raises(vera_fx.TargetError, match=r"layers.0.up.weight is cut .*use fully_shard"):
        vera_fx.adapt(model, config())
    assert not hasattr(model, "vera")


@two_processes
def test_after_adapting() -> None:
    model, mesh = adapted(), init_device_mesh("cpu", (dist.get_world_size(),))
    model(X)
    for layer in model.layers:
        parallelize_module(layer, mesh, PLAN)
    with pytest.raises(vera_fx.TargetError, match=r"layers.0.up.weight is cut"):
        model(X)


@two_processes
def test_below_fully_shard() -> None:
    """Sharded once more, over processes of which there is one: still cut along two dimensions."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = base()
    for layer in model.layers:
        parallelize_module(layer, mesh["tensor"], PLAN)
        fully_shard(layer, mesh=mesh["data"])
    with pytest.raises(vera_fx.TargetError, match=r"is cut over processes \(.*tensor parallelism"):
        vera_fx.adapt(model, config())
