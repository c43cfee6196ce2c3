"""How the states of a text's tokens become one vector."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vera_fx.errors import ConfigError

POOLINGS = ("mean", "cls", "last")


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Vectors of length 1, ``(texts, width)``.

    Args:
        states: of the last layer, ``(texts, tokens, width)``.
        mask: 1 for tokens, 0 for padding on either side, ``(texts, tokens)``.
        pooling: one of `POOLINGS`: the mean of the tokens, the first or the last one.
    """
    if pooling == "cls":
        found = states[:, 0]
    elif pooling == "last":
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        found = states[torch.arange(len(states), device=mask.device), last]
    else:
        weights = mask[..., None].to(states.dtype)
        found = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    return F.normalize(found, dim=-1)


def pooling_of(folder: Path) -> str:
    """What a model's folder itself says, in the form of sentence-transformers; else the mean.

    Raises:
        ConfigError: it says something else.
    """
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}; give pooling") from error
    known = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
    found = [name for name, key in known.items() if said.get(f"pooling_mode_{key}")]
    if isinstance(said.get("pooling_mode"), str) and said["pooling_mode"] in known:
        found = [said["pooling_mode"]]
    if len(found) != 1:
        raise ConfigError(f"{file} asks for a pooling other than mean, cls or last; give pooling")
    return found[0]
