"""What torch and others wrap around a model: functions of a model take the wrapper for the model in it.

``DistributedDataParallel``, the wrapper of ``torch.compile`` and wrappers like them hold one module and
nothing else, so that what is asked of the wrapper can only mean that module.
"""

from typing import TypeVar, cast

from torch import nn

from vera_fx.base.modules import ADAPTED, is_extended

M = TypeVar("M")

_ONLY_CHILD = (["module"], ["_orig_mod"], ["_forward_module"], ["_fsdp_wrapped_module"])
"""What wrappers call the one module that they have."""


def unwrapped(model: M) -> M:
    """The adapted model inside of all wrappers; ``model`` itself if there is none."""
    found: object = model
    while isinstance(found, nn.Module) and not is_extended(found, ADAPTED):
        if [*found._modules] not in _ONLY_CHILD:
            return model
        (found,) = found._modules.values()
    return cast("M", found)
