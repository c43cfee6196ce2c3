"""What one talks with: a causal language model with its tokeniser and adapters, from folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vera_fx.checkpoint.loading import load_adapter
from vera_fx.checkpoint.saved import is_saved
from vera_fx.cli.folders import model_class
from vera_fx.errors import ConfigError, first_line, shown
from vera_fx.model.adapters import set_adapter
from vera_fx.recipes.base_models import load_tokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Speaker:
    """A model in eval mode.

    Attributes:
        model: the model; adapted, if there are adapters.
        tokenizer: its tokeniser.
        adapters: the names of the adapters; the first is active.
    """

    model: Any
    tokenizer: Any
    adapters: tuple[str, ...]


def load_speaker(
    folder: Path, adapters: Sequence[str], *, device: torch.device, dtype: str
) -> Speaker:
    """Load a language model and adapters.

    Args:
        folder: of the model.
        adapters: folders of adapters or of runs, each perhaps with a name before it: ``name=folder``.
        device: where the model is to be.
        dtype: of its weights; ``"auto"`` as they were saved.

    Raises:
        ConfigError: the folder holds another model, or what is named is no adapter.
        CheckpointError: an adapter is damaged, or does not fit the model.
    """
    found = named(adapters)
    model, tokenizer = _language_model(folder, dtype), load_tokenizer(folder)
    model.eval().to(device)
    for name, path in found.items():
        load_adapter(model, path, adapter_name=name)
    if found:
        set_adapter(model, next(iter(found)))
    return Speaker(model, tokenizer, tuple(found))


def _language_model(folder: Path, dtype: str) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    cls, _ = model_class(folder)
    if cls.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ConfigError(
            f"{str(folder)!r} is a {cls.__name__}; chat talks with causal language models"
        )
    try:
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        return cls.from_pretrained(folder, local_files_only=True, dtype=kind)
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"{str(folder)!r} cannot be loaded: {first_line(error)}") from error


def named(texts: Sequence[str]) -> dict[str, Path]:
    """The folders of adapters by their names.

    Raises:
        ConfigError: a folder is neither an adapter nor a run with one, or a name comes twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, path = _named(text)
        if name in found:
            raise ConfigError(
                f"two adapters are called {name!r}: {str(found[name])!r} and {str(path)!r}; give one "
                "another name: name=folder"
            )
        found[name] = path
    return found


def _named(text: str) -> tuple[str, Path]:
    """A run's adapter is called as the run."""
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        name, rest = "", text
    path = Path(rest)
    path = path / "adapter" if is_saved(path / "adapter") else path
    if not is_saved(path):
        raise ConfigError(
            f"{shown(rest)} is no adapter; give a folder that save_adapter or PEFT wrote, or a run's"
        )
    whole = path.absolute()
    return name or (whole.parent.name if whole.name == "adapter" else whole.name), path
