"""What the tests of training share: one base for both libraries, with adapters of one configuration."""

import copy
from typing import Any

import peft
import torch
from torch import nn

import vera_fx

X = torch.randn(5, 10, generator=torch.Generator().manual_seed(3))
TARGETS = ["lin0", "lin1"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both(
    base: nn.Module,
    *,
    autocast: bool | tuple[bool, ...] = True,
    names: tuple[str, ...] = ("default",),
    **fields: Any,
) -> tuple[peft.PeftModel, nn.Module]:
    """The base adapted by PEFT and by us, with several adapters of one configuration."""
    fields = {"r": 4, "target_modules": TARGETS} | fields
    casts = autocast if isinstance(autocast, tuple) else (autocast,) * len(names)
    theirs = ours = None
    for name, cast in zip(names, casts, strict=True):
        options = {"adapter_name": name, "autocast_adapter_dtype": cast}
        mine = vera_fx.VeraConfig(plan="factored", **fields)
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**fields), **options)
            ours = vera_fx.adapt(copy.deepcopy(base), mine, **options)
        else:
            theirs.add_adapter(peft_config=peft.VeraConfig(**fields), **options)
            vera_fx.add_adapter(ours, name, autocast_adapter_dtype=cast)
    return theirs, ours
