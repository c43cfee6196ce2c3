"""The model of `tests.distributed.training` under tensor parallelism; sizes that two do not divide."""

from typing import Any

from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import vera_fx
from tests.distributed.training import base, config
from tests.helpers import fill_vectors

PAIRED = {"up": ColwiseParallel(), "down": RowwiseParallel()}
"""What passes between the two layers is cut, 9 features as 5 and 4."""

WHOLE = {
    "up": ColwiseParallel(output_layouts=Replicate()),
    "down": RowwiseParallel(input_layouts=Replicate()),
}
"""Each layer takes and gives whole tensors."""


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def parallel(model: nn.Module, layouts: dict[str, Any] | None = None) -> Any:
    for layer in model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, mesh(), layouts or PAIRED)
    return model


def adapted_parallel(layouts: dict[str, Any] | None = None, **fields: object) -> Any:
    model = vera_fx.adapt(parallel(base(), layouts), config(**fields))
    fill_vectors(model)
    return model
