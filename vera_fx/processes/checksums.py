"""Numbers that tell whether processes hold the same tensors, without sending these."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vera_fx._torch import is_wrapper

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

Checksum = tuple[tuple[int, int], ...]
"""Of each part of a tensor its size, and the sum of its words."""


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, Checksum]:
    """Checksums by name: equal for equal tensors, and for others hardly ever.

    What has no values (on the device meta) counts by its size. Wrappers around several tensors, as
    quantised weights are, count by these.
    """
    return {name: tuple(map(_sum_of, _parts(tensor))) for name, tensor in tensors.items()}


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    if is_wrapper(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


@torch.no_grad()
def _sum_of(tensor: Tensor) -> tuple[int, int]:
    if tensor.is_meta or not tensor.numel():
        return tensor.numel(), 0
    values = tensor.data.contiguous().reshape(-1)
    words = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
    words = words.view(torch.uint8) if words.dtype == torch.bool else words
    return tensor.numel(), int(words.view(_WORDS[words.element_size()]).sum(dtype=torch.int64))
