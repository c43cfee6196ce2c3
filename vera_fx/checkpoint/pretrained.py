"""``save_pretrained`` of an adapted transformers model, which Trainer calls: the adapter alone, as PEFT's."""

import functools
import os
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from vera_fx.bank.bank import bank_of
from vera_fx.base.hf import is_pretrained_class
from vera_fx.base.modules import in_bank
from vera_fx.checkpoint.saving import save_adapters
from vera_fx.disk.files import moved_into
from vera_fx.errors import CheckpointError

RESUMED_FROM = "model.safetensors"
"""What Trainer reads of a checkpoint that it resumes; it knows adapters only if they are PEFT's."""

_CHECKPOINT = re.compile(r"checkpoint-\d+")


def pretrained_methods(base: type[nn.Module]) -> dict[str, Any]:
    """``save_pretrained``, if ``base`` is a class of transformers' models."""
    return {"save_pretrained": _save_pretrained(base)} if is_pretrained_class(base) else {}


def _save_pretrained(base: Any) -> Any:
    @functools.wraps(base.save_pretrained)
    def save_pretrained(
        self: nn.Module,
        save_directory: str | os.PathLike[str],
        *args: Any,
        keep_base: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Save the adapters as PEFT does, or, with ``keep_base``, the whole model with its bank.

        In folders called ``checkpoint-<step>``, which Trainer makes, there is also a small
        ``model.safetensors`` with all that the bank holds, so that training can be resumed.

        Raises:
            CheckpointError: nothing is written then.
        """
        if keep_base or not bank_of(self).adapters:
            return base.save_pretrained(self, save_directory, *args, **kwargs)
        if kwargs.pop("push_to_hub", False):
            raise CheckpointError(
                "an adapted model saves its adapters, and does not push them; save them and call "
                "huggingface_hub.upload_folder, or ask for the whole model with keep_base=True"
            )
        if kwargs.pop("is_main_process", True):
            save_adapters(self, save_directory)
            if _CHECKPOINT.fullmatch(Path(save_directory).name):
                _save_bank(self, Path(save_directory))
        return None

    return save_pretrained


def _save_bank(model: nn.Module, folder: Path) -> None:
    held = {key: value for key, value in model.state_dict().items() if in_bank(key)}
    tensors = {key: value.cpu().contiguous().clone() for key, value in held.items()}
    try:
        with moved_into(folder) as aside:
            save_file(tensors, aside / RESUMED_FROM, metadata={"format": "pt"})
    except OSError as error:
        raise CheckpointError(f"the checkpoint could not be saved to {folder}: {error}") from error
