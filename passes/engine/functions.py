"""Functions that adapted graphs call. They are importable by name, as FX needs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, which compiled code computes again in backward rather than keep.

    torch.compile marks what a checkpoint calls as cheaper to compute than to keep. Eagerly that
    would cost a second forward of the region and its bookkeeping, so eager code keeps the result.
    """
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        return checkpoint.checkpoint(function, *inputs, use_reentrant=False)  # pyright: ignore
    return function(*inputs)
