"""Writes adapters to disk in PEFT's layout, each folder whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.names import check_known
from vera_fx.checkpoint.embeddings import embeddings_to_save
from vera_fx.checkpoint.model_card import write_card
from vera_fx.checkpoint.peft_config import CONFIG_FILE, to_json
from vera_fx.checkpoint.state_dict import adapter_state_dict, projections_hash
from vera_fx.checkpoint.weights_file import HASH, WEIGHTS_FILE
from vera_fx.errors import AdapterError, CheckpointError
from vera_fx.files import moved_into
from vera_fx.graphs.runtime import require_adapted

DEFAULT = "default"
"""The adapter that PEFT keeps in the folder itself and not in one of its name below."""


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = DEFAULT,
    save_embedding_layers: bool | str = "auto",
) -> Path:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card as PEFT does.

    The files are written aside and then moved into place, so that a crash or a full disk never
    leaves half a file. A ``README.md`` that is there already stays.

    Args:
        model: an adapted model.
        directory: folder for the files; made if it does not exist.
        adapter_name: the adapter to save.
        save_embedding_layers: whether the base's input and output embeddings go along; ``"auto"``
            if the vocabulary was resized since the base was loaded.

    Returns:
        The folder.

    Raises:
        AdapterError: the model is not adapted or there is no such adapter.
        CheckpointError: the adapter has no values yet, or the folder cannot be written to.
        ConfigError: embeddings are asked for and the model has none.
    """
    bank = require_adapted(model)
    check_known(adapter_name, bank.adapters)
    tensors = _contents(model, bank, adapter_name, save_embedding_layers)
    return _write(model, bank, adapter_name, tensors, Path(directory))


def save_adapters(
    model: nn.Module,
    directory: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Path]:
    """Write several adapters as PEFT's ``save_pretrained`` lays them out.

    The adapter called ``"default"`` goes into the folder itself, every other into a folder of its
    name below.

    Args:
        model: an adapted model.
        directory: the folder; made if it does not exist.
        names: the adapters to save; None for all.
        save_embedding_layers: as for `save_adapter`.

    Returns:
        The folder of each adapter by its name.

    Raises:
        AdapterError: the model is not adapted, a name is unknown, or there is none. Nothing is
            written then.
        CheckpointError: as for `save_adapter`, from the first adapter that cannot be saved.
    """
    bank = require_adapted(model)
    chosen = list(bank.adapters) if names is None else list(dict.fromkeys(names))
    if isinstance(names, str) or not chosen:
        raise AdapterError(
            f"names must be a list of adapters, got {names!r} of {list(bank.adapters)}"
        )
    for name in chosen:
        check_known(name, bank.adapters)
    found = {name: _contents(model, bank, name, save_embedding_layers) for name in chosen}
    folder = Path(directory)
    return {
        name: _write(model, bank, name, tensors, folder if name == DEFAULT else folder / name)
        for name, tensors in found.items()
    }


def _contents(
    model: nn.Module, bank: AdapterBank, name: str, embeddings: bool | str
) -> dict[str, Tensor]:
    """All tensors of the adapter's file, as they are."""
    adapter = bank.adapter(name)
    state = embeddings_to_save(model, bank, adapter, embeddings) | adapter_state_dict(model, name)
    empty = [key for key, tensor in state.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"adapter {name!r} cannot be saved: {empty[0]!r} is on the meta device, without values"
        )
    return state


def _write(
    model: nn.Module, bank: AdapterBank, name: str, state: dict[str, Tensor], folder: Path
) -> Path:
    adapter = bank.adapter(name)
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in state.items()}
    metadata = {"format": "pt", HASH: projections_hash(bank.projections_of(adapter).tensors)}
    try:
        with moved_into(folder) as aside:
            save_file(tensors, aside / WEIGHTS_FILE, metadata=metadata)
            (aside / CONFIG_FILE).write_text(to_json(model, adapter), encoding="utf-8")
            write_card(folder, aside, model, adapter)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"adapter {name!r} could not be saved to {folder}: {error}"
        ) from error
    return folder
