"""What transformers (5.23) does in another way while a model is captured: equal, but traceable well.

- Sliding-window cache layers cut ``[-(window - 1):]`` off whatever they hold, and tell a full
  window from one that lacks a token. A trace takes each of these cases for a graph of its own, two
  of them for one token each. The methods here compute the same numbers with one case distinction:
  does the new token push an old one out? So one graph decodes until the window is full, one after.
- Attention of one token over grouped keys packs the queries when it runs eagerly, and repeats the
  keys when it is traced, which rounds otherwise and copies the cache. Graphs here have the length 1
  in their signature, so they pack.
- Masks that say no more than "causal" are left out when it runs eagerly, for which attention has
  faster kernels, and written out when it is exported, since a program may meet other sizes. Graphs
  here are admitted by their guards only, so they leave them out where no mask is passed.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from vera_fx._context import original, patched

_NAME = "traceable transformers"


def traceable() -> contextlib.AbstractContextManager[None]:
    """Inside the block transformers has the functions of this file.

    They are exact, so that calls in other threads may run into them.
    """
    return patched(_NAME, _replacements)


def _replacements() -> dict[tuple[Any, str], Any]:
    from transformers import masking_utils
    from transformers.cache_utils import DynamicSlidingWindowLayer
    from transformers.integrations import sdpa_attention

    return {
        (DynamicSlidingWindowLayer, "update"): _update,
        (DynamicSlidingWindowLayer, "get_mask_sizes"): _get_mask_sizes,
        (sdpa_attention, "is_torchdynamo_compiling"): _no,
        (masking_utils, "is_torchdynamo_exporting"): _no,
    }


def _no() -> bool:
    return False


def _update(
    self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    if self.record_past:  # assisted decoding, which keeps what falls out of the window
        from transformers.cache_utils import DynamicSlidingWindowLayer

        update = original(_NAME, DynamicSlidingWindowLayer, "update")
        return update(self, key_states, value_states, *args, **kwargs)
    if not self.is_initialized:
        self.lazy_initialization(key_states, value_states)
    self.cumulative_length += key_states.shape[-2]
    keys = torch.cat([self.keys, key_states], dim=-2)
    values = torch.cat([self.values, value_states], dim=-2)
    kept = self.sliding_window - 1
    fits = keys.shape[-2] <= kept
    self.keys = keys if fits else keys[:, :, -kept:, :]
    self.values = values if fits else values[:, :, -kept:, :]
    return keys, values


def _get_mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
    kept = self.sliding_window - 1
    if self.cumulative_length < kept:
        return self.cumulative_length + query_length, 0
    return kept + query_length, self.cumulative_length - kept
