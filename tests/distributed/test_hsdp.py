"""FSDP2 over a mesh of two dimensions: torch's HSDP, copies of shards."""

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.training import (
    adapted,
    assert_trained,
    base,
    batches,
    config,
    mine,
    train,
    trained_alone,
)
from tests.helpers import assert_close, fill_vectors

X = batches(1)[0]
MESHES = {"copies": (2, 1), "shards": (1, 2)}


@pytest.mark.parametrize("order", ["adapted first", "sharded first"])
@pytest.mark.parametrize("shape", MESHES)
@two_processes
def test_copies_of_shards(shape: str, order: str) -> None:
    mesh = init_device_mesh("cpu", MESHES[shape], mesh_dim_names=("replicate", "shard"))
    model: Any = adapted() if order == "adapted first" else base()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if order == "sharded first":
        fill_vectors(vera_fx.adapt(model, config()))
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone())
    state = vera_fx.adapter_state_dict(model)
    alone = adapted()
    vera_fx.load_adapter_state_dict(alone, state)
    with torch.no_grad():
        assert_close(model(X), alone(X))
