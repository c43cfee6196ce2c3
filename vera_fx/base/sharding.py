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

from vera_fx._torch_parallel import flattened
from vera_fx.base.modules import original_class
from vera_fx.errors import AdapterError, TargetError
from vera_fx.products.kinds import style_of

_SHARDED = "its parameters are sharded (fully_shard), and gathered by hooks of the modules"

_PARALLEL = "modules in it are parallel, and take and give what only their hooks know"


def is_sharded(module: nn.Module) -> bool:
    """True for a module that ``fully_shard`` was applied to."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def has_sharded(model: nn.Module) -> bool:
    """True if a module of the model is sharded, or the model itself."""
    return any(map(is_sharded, model.modules()))


def spread_reason(model: nn.Module) -> str:
    """Why the model, which is sharded or parallel in a way that graphs do not know, runs in Python."""
    return _SHARDED if has_sharded(model) else _PARALLEL


def has_parallel(model: nn.Module) -> bool:
    """True if a module of the model is under tensor parallelism."""
    return any(style_of(module) is not None for module in model.modules())


def is_distributed(tensor: Tensor) -> bool:
    """True for a ``DTensor``, of which each process holds a part."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")


def refuse_flattened(model: nn.Module) -> None:
    """Refuse a model under FSDP1.

    Raises:
        AdapterError: ``FullyShardedDataParallel`` is in it, or around it and calls it now.
    """
    if flattened(model):
        raise AdapterError(
            f"this {original_class(model).__name__} is under FullyShardedDataParallel (FSDP1), which "
            "keeps parameters as views of flat tensors that come and go, where graphs find none to read; "
            "shard its layers and the model by fully_shard (FSDP2), which takes the place of FSDP1 in torch"
        )


def check_gathered(model: nn.Module) -> None:
    """Refuse a model with parameters that are cut by two hands, or by none that is known.

    Raises:
        TargetError: tensor parallelism below ``fully_shard``, or tensors distributed by hand.
        AdapterError: the model is, or has in it, a ``FullyShardedDataParallel``.
    """
    refuse_flattened(model)
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for name, tensor in module._parameters.items():
            if tensor is not None and is_distributed(tensor):
                _check_cut(f"{path}.{name}", tensor, module, gathered=_is_gathered(path, modules))


def _check_cut(name: str, tensor: Tensor, module: nn.Module, *, gathered: bool) -> None:
    cuts = sum(placement.is_shard() for placement in tensor.placements)  # type: ignore[attr-defined]
    parallel = style_of(module) is not None
    if cuts > 1 or (gathered and parallel):
        raise TargetError(
            f"{name} is cut over processes ({_placements(tensor)}) by tensor parallelism and by fully_shard, "
            "and only one of them is known to work with adapters; use either"
        )
    if not (gathered or parallel):
        raise TargetError(
            f"{name} is cut over processes ({_placements(tensor)}), and its module has neither a parallel style "
            "nor fully_shard to compute with a part; use parallelize_module or fully_shard"
        )


def _is_gathered(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """True if ``fully_shard`` gathers the parameters of this module, at it or at one around it."""
    parts = path.split(".") if path else []
    around = ("", *(".".join(parts[: n + 1]) for n in range(len(parts))))
    return any(is_sharded(modules[outer]) for outer in around if outer in modules)


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
