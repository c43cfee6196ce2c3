"""How long a text may be for the model of a folder, known before the model is loaded."""

from pathlib import Path
from typing import Any

import torch

from vera_fx.base.positions import room_of
from vera_fx.recipes.base_models import check_folder
from vera_fx.recipes.recipe import Recipe

_OFFSETS = 8
"""More rows than any table of positions leaves unused before a text's first token."""


def length_of(recipe: Recipe) -> int:
    """The longest row in tokens: the recipe's ``length``, or what the model has positions for."""
    room = folder_room(recipe.model, recipe.length)
    return recipe.length if room is None else min(recipe.length, room)


def folder_room(folder: Path, wanted: int) -> int | None:
    """How many tokens a model's table of positions has room for; None if that may be ``wanted``.

    What the tokeniser says (``model_max_length``) is another thing, and in many folders nothing at all.

    Args:
        folder: of the model; no weights are read.
        wanted: tokens that would be enough.
    """
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(
        check_folder(folder), local_files_only=True
    )
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is None or wanted + _OFFSETS <= most:
        return None
    try:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
    except ValueError:  # of no kind that transformers knows: loading it will say so
        return None
    room = room_of(model)
    return None if room is None else room[1]
