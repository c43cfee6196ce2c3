"""Models from folders: with their weights, or on the meta device from their configuration alone."""

from pathlib import Path
from typing import Any

import torch

from vera_fx.errors import ConfigError
from vera_fx.recipes.base_models import check_folder


def model_class(folder: Path) -> tuple[Any, Any]:
    """The class that a model folder names, and its configuration.

    Raises:
        ConfigError: the folder holds no model, or one of a class that transformers does not have.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(check_folder(folder), local_files_only=True)
    names = getattr(config, "architectures", None) or ["AutoModel"]
    found = getattr(transformers, names[0], None)
    if found is None:
        raise ConfigError(
            f"{str(folder)!r} is a model of class {names[0]!r}, which this transformers "
            f"{transformers.__version__} does not have"
        )
    return found, config


def load(folder: Path) -> Any:
    """The model with its weights, in eval mode."""
    cls, _ = model_class(folder)
    return cls.from_pretrained(folder, local_files_only=True).eval()


def on_paper(folder: Path) -> Any:
    """The model on the meta device: sizes without values."""
    cls, config = model_class(folder)
    with torch.device("meta"):
        return cls(config) if cls.__name__ != "AutoModel" else cls.from_config(config)


def check_new(out: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: the path exists.
    """
    if out.exists():
        raise ConfigError(f"{str(out)!r} exists; give a path that does not")
