"""Writes adapters to disk in PEFT's layout, each folder whole or not at all."""

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vera_fx._renamed import renamed
from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.blueprint import blueprint
from vera_fx.bank.build import draw
from vera_fx.bank.names import check_apart, check_known
from vera_fx.base.sharding import whole
from vera_fx.base.targets import resolve_targets
from vera_fx.checkpoint.embeddings import embeddings_to_save
from vera_fx.checkpoint.model_card import CARD_FILE, card
from vera_fx.checkpoint.peft_config import CONFIG_FILE, MAX_BYTES, to_json
from vera_fx.checkpoint.saved import CONFIG, REPLACES, path_of
from vera_fx.checkpoint.state_dict import adapter_state_dict
from vera_fx.checkpoint.weights_file import HASH, WEIGHTS_FILE, projections_hash, shared_keys
from vera_fx.disk.files import aside, flush, folds_case, make_folder, put, sha256, writing
from vera_fx.disk.safetensors_file import SHA256, digest
from vera_fx.errors import AdapterError, CheckpointError, VeraFxError
from vera_fx.graphs.runtime import require_adapted
from vera_fx.processes.wrapped import unwrapped

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

    The files are written aside, flushed, and put into place by one rename, so that a crash or a full
    disk leaves the old adapter or the new one, whole. Writers wait for each other. Other files of the
    folder stay, and so does a ``README.md`` that is there already. In several processes one of them or
    all may call this; all have to if the model is sharded (``fully_shard``).

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
    model = unwrapped(model)
    bank = require_adapted(model)
    check_known(adapter_name, bank.adapters)
    tensors = _contents(model, bank, adapter_name, save_embedding_layers)
    return _write(model, bank, adapter_name, tensors, path_of(directory))


@renamed(names="adapter_names")
def save_adapters(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_names: Sequence[str] | None = None,
    *,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Path]:
    """Write several adapters as PEFT's ``save_pretrained`` lays them out.

    The adapter called ``"default"`` goes into the folder itself, every other into a folder of its
    name below.

    Args:
        model: an adapted model.
        directory: the folder; made if it does not exist.
        adapter_names: the adapters to save; None for all.
        save_embedding_layers: as for `save_adapter`.

    Returns:
        The folder of each adapter by its name.

    Raises:
        AdapterError: the model is not adapted, a name is unknown, or there is none. Nothing is
            written then.
        CheckpointError: as for `save_adapter`, from the first adapter that cannot be saved.
    """
    bank = require_adapted(model := unwrapped(model))
    chosen = list(bank.adapters if adapter_names is None else dict.fromkeys(adapter_names))
    if isinstance(adapter_names, str) or not chosen:
        raise AdapterError(
            f"adapter_names must be a list of adapters, got {adapter_names!r} of {list(bank.adapters)}"
        )
    for name in chosen:
        check_known(name, bank.adapters)
    found = {name: _contents(model, bank, name, save_embedding_layers) for name in chosen}
    folder = _folder_for(directory, chosen)
    return {
        name: _write(model, bank, name, tensors, folder if name == DEFAULT else folder / name)
        for name, tensors in found.items()
    }


def _folder_for(directory: str | os.PathLike[str], names: Sequence[str]) -> Path:
    """The folder, after names have been refused that would be one folder there."""
    folder = path_of(directory)
    try:
        check_apart(names)
    except AdapterError:
        try:
            make_folder(folder)
            if folds_case(folder):
                raise
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written to: {error}") from error
    return folder


def _contents(
    model: nn.Module, bank: AdapterBank, name: str, embeddings: bool | str
) -> dict[str, Tensor]:
    """All tensors of the adapter's file, as they are."""
    adapter = bank.adapter(name)
    beside = embeddings_to_save(model, bank, adapter, embeddings)
    state = {k: whole(t) for k, t in beside.items()} | adapter_state_dict(model, name)
    empty = [key for key, tensor in state.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"adapter {name!r} cannot be saved: {empty[0]!r} is on the meta device, without values"
        )
    return state


def _write(
    model: nn.Module, bank: AdapterBank, name: str, state: dict[str, Tensor], folder: Path
) -> Path:
    adapter, shared = bank.adapter(name), bank.projections_of(bank.adapter(name)).tensors
    config, keys = adapter.config, shared_keys(adapter.kind)
    if shared and not config.saves_shared and not _can_draw(model, adapter, shared):
        # Without them the file could not be loaded again, not even onto this model.
        warnings.warn(
            f"the projections of adapter {name!r} are not those that its seed gives (the model was cast, "
            "or they were changed); they are saved with it",
            stacklevel=3,
        )
        config = config.saving_shared()
        state = {**state, **{keys[key]: tensor for key, tensor in shared.items()}}
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in state.items()}
    files = {CONFIG_FILE: to_json(model, adapter, config), CARD_FILE: card(model, adapter)}
    try:
        with replacing(folder, tensors, files, {HASH: projections_hash(shared)}) as (
            path,
            metadata,
        ):
            save_file(tensors, path, metadata=metadata)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"adapter {name!r} could not be saved to {folder}: {error}"
        ) from error
    return folder


def _can_draw(model: nn.Module, adapter: Adapter, shared: Mapping[str, Tensor]) -> bool:
    """Whether a reader who draws the projections for this model would get these."""
    try:
        targets = resolve_targets(model, adapter.config, strict=False)
        drawn = draw(blueprint(model, adapter.config, targets))
    except VeraFxError:
        return False
    return projections_hash(drawn) == projections_hash(shared)


@contextlib.contextmanager
def replacing(
    folder: Path, tensors: Mapping[str, Tensor], files: Mapping[str, str], more: Mapping[str, str]
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Put an adapter into a folder: by the one rename that puts its weights there, after the block.

    The block writes the weights. They bring the configuration's text along (`vera_fx.checkpoint.saved`).
    Other files of the folder stay, and so does a model card.

    Args:
        folder: the folder; made if it does not exist.
        tensors: the tensors that the block writes.
        files: the texts of the configuration and of the card, by name.
        more: further metadata of the weights.

    Yields:
        Where to write them, and with which metadata.

    Raises:
        OSError: the files cannot be written, or another writer does not come to an end.
        ValueError: they would be too large to be loaded.
    """
    text = files[CONFIG_FILE].encode()
    if len(text) > MAX_BYTES:
        raise ValueError(f"{CONFIG_FILE} would have {len(text):,} bytes; at most are {MAX_BYTES:,}")
    with writing(folder), aside(folder) as temporary:
        new = [name for name in files if not _stays(folder / name, files[name])]
        metadata = {"format": "pt", **more, CONFIG: files[CONFIG_FILE]}
        if CONFIG_FILE in new and (folder / CONFIG_FILE).is_file():
            metadata[REPLACES] = sha256((folder / CONFIG_FILE).read_bytes())
        yield temporary / WEIGHTS_FILE, {**metadata, SHA256: digest(tensors, metadata)}
        for name in new:
            (temporary / name).write_bytes(files[name].encode())
        _finish(temporary, folder, [WEIGHTS_FILE, *new])


def _stays(path: Path, text: str) -> bool:
    """Whether a file is left as it is: a card of anyone's, or the same text."""
    if path.name == CARD_FILE:
        return path.exists()
    return path.is_file() and path.read_bytes() == text.encode()


def _finish(temporary: Path, folder: Path, names: Sequence[str]) -> None:
    # safetensors makes its files readable for their owner alone.
    probe = temporary / ".mode"
    probe.touch()
    (temporary / WEIGHTS_FILE).chmod(stat.S_IMODE(probe.stat().st_mode))
    for name in names:
        flush(temporary / name)
    for name in names:
        put(temporary / name, folder / name)
