"""Base models and what prepares their inputs, from a model folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vera_fx.errors import ConfigError, first_line
from vera_fx.recipes.recipe import Recipe

HEADS = ("classifier", "score", "head", "fc")
"""What transformers calls the heads of its classifiers."""


@dataclass(frozen=True)
class Base:
    """A model, in eval mode.

    Attributes:
        model: the model.
        fresh: paths of modules that its folder has no values for, drawn from the recipe's seed.
    """

    model: Any
    fresh: tuple[str, ...]


def load_base(recipe: Recipe, kind: str, **fields: Any) -> Base:
    """The base model of a recipe.

    Args:
        recipe: names the folder, the dtype and the seed.
        kind: transformers' class of models, such as ``"AutoModelForCausalLM"``.
        fields: of the model's configuration.

    Raises:
        ConfigError: the folder holds no model, or none of that kind.
    """
    import transformers

    folder = check_folder(recipe.model)
    transformers.set_seed(recipe.seed)
    dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    try:
        model, info = getattr(transformers, kind).from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **fields,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{folder} cannot be loaded for the task {recipe.task!r}: {first_line(error)}"
        ) from error
    lost = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    return Base(model.eval(), tuple(dict.fromkeys(_owner(model, key) for key in sorted(lost))))


def _owner(model: nn.Module, key: str) -> str:
    """The module that a tensor belongs to, or the head around it."""
    top = key.partition(".")[0]
    path = top if top in HEADS else key.rpartition(".")[0]
    if not path:
        raise ConfigError(
            f"the folder has no value for {key!r} of {type(model).__name__}, which no adapter can train"
        )
    return path


def check_folder(folder: Path) -> Path:
    """The folder of a model.

    Raises:
        ConfigError: there is no model in it.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{str(folder)!r} is no model folder: there is no config.json in it; give the folder that "
            "model.save_pretrained wrote"
        )
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The tokeniser of a model folder, which can pad.

    Raises:
        ConfigError: there is none, or one without what a batch needs.
    """
    import transformers

    check_folder(folder)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"{folder} has no tokeniser: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"the tokeniser in {folder} is a {type(tokenizer).__name__}, which does not say where its "
            "tokens stand in the text; a fast one (tokenizer.json) is needed"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokeniser in {folder} has neither a padding nor an end token; set one and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(folder: Path) -> Any:
    """What turns pictures into tensors for the model of a folder.

    Raises:
        ConfigError: there is none.
    """
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(
            check_folder(folder), local_files_only=True
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ConfigError(f"{folder} has no image processor: {first_line(error)}") from error
