"""How many tokens a model has positions for: the rows of its learned table of positions.

Models with rotary or relative positions have no such table; nothing fails there, however long a text is.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from vera_fx.base.hf import is_pretrained
from vera_fx.base.modules import in_bank, original_class
from vera_fx.errors import LengthError

_NAMES = {"position_embeddings", "position_embedding", "embed_positions", "wpe"}
"""What transformers calls tables of positions."""

_PLACES = {"position_ids", "decoder_position_ids"}
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def room_of(model: nn.Module) -> tuple[str, int] | None:
    """The path of a model's table of positions for texts, and how many tokens it has room for.

    None without a table, and for models that are not from transformers.
    """
    found = list(_tables(model)) if is_pretrained(model) else []
    return min(found, key=lambda pair: pair[1], default=None)


def _tables(model: nn.Module) -> Iterator[tuple[str, int]]:
    config: Any = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    for path, module in model.named_modules():
        named = path.rpartition(".")[2] in _NAMES and not in_bank(path)
        if named and isinstance(module, nn.Embedding) and most is not None:
            rows, first = module.num_embeddings, _first(module)
            if rows in {most, most + first}:  # else of pictures, beside the text's
                yield path, rows - first


def _first(table: nn.Embedding) -> int:
    """The row of a text's first token: RoBERTa begins after padding's row, OPT and BART at 2."""
    if type(table) is nn.Embedding:
        return 0 if table.padding_idx is None else table.padding_idx + 1
    offset = getattr(table, "offset", 0)
    return offset if isinstance(offset, int) else 0


def too_long(model: nn.Module, arguments: Mapping[str, Any]) -> LengthError | None:
    """What to say of a call that failed, if it has more tokens than the model has positions for.

    Args:
        model: the model.
        arguments: of the call, by name.
    """
    if (room := room_of(model)) is None:
        return None
    path, most = room
    given = [value for name in _PLACES if isinstance(value := arguments.get(name), Tensor)]
    tokens = _past(arguments) + max(map(_tokens, map(arguments.get, _TOKENS)))
    if given:
        tokens = max(map(_last, given)) - _skipped(model.get_submodule(path))
    if tokens <= most:
        return None
    return LengthError(
        f"{original_class(model).__name__} was called with {tokens} tokens in a row, and its table of "
        f"positions ({path!r}) has room for {most}; cut texts where they become tokens: "
        f"tokenizer(..., truncation=True, max_length={most})"
    )


def _last(places: Tensor) -> int:
    """How many positions there are up to the last one; 0 where reading it may raise an error anew."""
    return int(places.max()) + 1 if places.device.type == "cpu" and places.numel() else 0


def _skipped(table: Any) -> int:
    """What positions that are passed begin with: the tables of OPT and BART add theirs themselves."""
    return _first(table) if type(table) is nn.Embedding else 0


def _tokens(value: Any) -> int:
    return value.shape[1] if isinstance(value, Tensor) and value.ndim > 1 else 0


def _past(arguments: Mapping[str, Any]) -> int:
    """The tokens that a cache holds already."""
    length = getattr(arguments.get("past_key_values"), "get_seq_length", None)
    return 0 if length is None else int(length())
