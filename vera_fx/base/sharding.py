"""Models whose parameters are gathered module by module: FSDP2's ``fully_shard``.

It gathers a module's parameters in a hook before the module's forward, and frees them after it. A graph of
the whole model calls no modules. So such a model runs in Python, and each innermost sharded module is a
part with a graph of its own, which reads the parameters while they are gathered.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

SHARDED = "its parameters are sharded (fully_shard), and gathered by hooks of the modules"


def is_sharded(module: nn.Module) -> bool:
    """True for a module that ``fully_shard`` was applied to."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def has_sharded(model: nn.Module) -> bool:
    """True if a module of the model is sharded, or the model itself."""
    return any(map(is_sharded, model.modules()))


def is_distributed(tensor: Tensor) -> bool:
    """True for a ``DTensor``, of which each process holds a part."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. If it is sharded this is a collective, which every process has to call."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[operator]


def put(value: Tensor, into: Tensor) -> None:
    """``into.copy_(value)`` where ``into`` may be sharded; every process has all of ``value``."""
    local_part(into).copy_(cut(value, into))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[operator]


def cut(value: Tensor, like: Tensor) -> Tensor:
    """What this process holds of ``value`` if it is sharded as ``like`` is."""
    if not is_distributed(like):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    same: Any = DTensor.from_local(
        value.to(device=mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    found = same.redistribute(mesh, like.placements).to_local()  # type: ignore[attr-defined]
    return found.to(local_part(like).device)


def freed(module: nn.Module) -> None:
    """Let every sharded module hold its shards alone, as before its forward; else nothing."""
    for part in module.modules():
        if is_sharded(part):
            with torch.no_grad():
                part.reshard()  # type: ignore[operator]
