"""Sums over processes that autograd knows, and torch's hooks of tensor parallelism, read.

What a process has of a tensor that is cut is its own business; a tensor that is whole is the same in
every process, and so is its gradient. These functions are where the one becomes the other. Adapted
graphs call them, and torch.compile traces into them: collectives are torch's functional ones.
"""

import sys
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_HOOKED_BY = "torch.distributed.tensor."


def sum_over(x: Tensor, group: str) -> Tensor:
    """The sum of every process's ``x``, which is whole from here on: its gradient is that of each ``x``.

    Args:
        x: a part of a sum, of any shape.
        group: name of the process group.
    """
    return _SumOver.apply(x, group)  # type: ignore[no-any-return]


def part_from(x: Tensor, group: str) -> Tensor:
    """``x`` as it is, whole, of which every process uses a part from here on: gradients are summed.

    Args:
        x: the same in every process, of any shape.
        group: name of the process group.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _PartFrom.apply(x, group)  # type: ignore[no-any-return]


def joined(x: Tensor, group: str, rank: int, world: int, width: int) -> Tensor:
    """The last dimensions of all processes, one after the other: whole, and so is its gradient.

    Args:
        x: this process's part, ``(*L, n)``; the last processes' may be narrower than the first's.
        group: name of the process group.
        rank: this process's place in it.
        world: how many there are.
        width: of the whole.

    Returns:
        ``(*L, width)``.
    """
    return _Joined.apply(x, group, rank, world, width)  # type: ignore[no-any-return]


def _summed(x: Tensor, group: str) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group))


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        # Its own gradient is the other function's: second derivatives are right as well.
        return part_from(grad_outputs[0], ctx.group), None


class _PartFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        return sum_over(grad_outputs[0], ctx.group), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, rank: int, world: int, width: int) -> Tensor:
        chunk = -(-width // world)
        ctx.start, ctx.own = rank * chunk, x.shape[-1]
        ops = torch.ops._c10d_functional
        # Those in the middle of a group gather as much as the first, and the rest is cut off.
        even = torch.nn.functional.pad(x, (0, chunk - x.shape[-1])).movedim(-1, 0).contiguous()
        parts = ops.wait_tensor(ops.all_gather_into_tensor(even, world, group))
        return parts[:width].movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        return grad_outputs[0].narrow(-1, ctx.start, ctx.own), None, None, None, None


def hook_parts(hook: object) -> dict[str, Any]:
    """What a hook of tensor parallelism holds; nothing for other hooks.

    Returns:
        For those of ``distribute_module``, ``input_fn`` or ``output_fn``, which it calls, and ``device_mesh``.
    """
    if not isinstance(hook, FunctionType) or not hook.__module__.startswith(_HOOKED_BY):
        return {}
    return closure_of(hook)


def closure_of(function: FunctionType) -> dict[str, Any]:
    """The names that a function has taken along from where it was made, and what they hold."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def flattened(model: nn.Module) -> bool:
    """True inside of a call of FSDP1's ``FullyShardedDataParallel`` around the model, or with one in it.

    It leaves no mark on what it wraps, but for the time of a call.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    wrapper = fsdp.FullyShardedDataParallel
    if any(isinstance(module, wrapper) for module in model.modules()):
        return True
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is wrapper.forward.__code__:
            return any(module is model for module in frame.f_locals["self"].modules())
        frame = frame.f_back
    return False
