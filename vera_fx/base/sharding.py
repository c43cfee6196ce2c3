"""Models whose parameters are gathered module by module: FSDP2's ``fully_shard``.

It gathers a module's parameters in a hook before the module's forward, and frees them after it. A graph of
the whole model calls no modules. So such a model runs in Python, and each innermost sharded module is a
part with a graph of its own, which reads the parameters while they are gathered.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vera_fx.errors import TargetError

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


def check_gathered(model: nn.Module) -> None:
    """Refuse a model with parameters that are cut and never gathered.

    Raises:
        TargetError: tensor parallelism, in which modules multiply by a part of their weight.
    """
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for name, tensor in module._parameters.items():
            if (
                tensor is not None
                and is_distributed(tensor)
                and not _is_gathered(path, tensor, modules)
            ):
                raise TargetError(
                    f"{path}.{name} is cut over processes ({_placements(tensor)}) by tensor parallelism, where "
                    "modules multiply by a part of their weight, and branches are made for whole ones; "
                    "use fully_shard (FSDP2), which gathers weights, or DistributedDataParallel"
                )


def _is_gathered(path: str, tensor: Tensor, modules: Mapping[str, nn.Module]) -> bool:
    """True if ``fully_shard`` cut it, of this module or one around it, and nothing else did."""
    parts = path.split(".") if path else []
    around = ("", *(".".join(parts[: n + 1]) for n in range(len(parts))))
    cuts = sum(placement.is_shard() for placement in tensor.placements)  # type: ignore[attr-defined]
    return cuts <= 1 and any(is_sharded(modules[outer]) for outer in around if outer in modules)


def _placements(tensor: Tensor) -> str:
    return ", ".join(map(str, tensor.placements))  # type: ignore[attr-defined]


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


def all_agree(holds: bool, like: Tensor) -> bool:
    """True if it holds in every process that has a part of ``like``."""
    if not is_distributed(like):
        return holds
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    flag = torch.tensor(float(holds), device=local_part(like).device)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(
            flag, torch.distributed.ReduceOp.MIN, group=mesh.get_group(dim)
        )
    return bool(flag)


def at_rest(model: nn.Module, *, everything: bool = False) -> None:
    """Let a sharded model hold shards, as optimisers do, and no gathered parameters of its last call.

    Args:
        model: any model; one that is not sharded stays as it is.
        everything: all of its modules, for their weights; else what is gathered with the model
            itself, among it all of the bank.
    """
    for module in model.modules() if everything else (model,):
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]
