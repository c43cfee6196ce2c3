"""Functions that adapted graphs call. They are importable by name, as FX needs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint


def call_module(module: nn.Module, x: Tensor) -> Tensor:
    """The product of a module whose weight only its own code can read.

    Args:
        module: the live module. Hooks on it run where Python calls modules, not here.
        x: its input, ``(*L, in)``.
    """
    return module.forward(x)


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, which compiled code computes again in backward rather than keep.

    torch.compile marks what a checkpoint calls as cheaper to compute than to keep. Eagerly that
    would cost a second forward of the region and its bookkeeping, so eager code keeps the result.
    """
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return checkpoint.checkpoint(function, *inputs, use_reentrant=False)  # pyright: ignore
    return function(*inputs)
