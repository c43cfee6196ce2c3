"""An adapter's folder as one save left it: a configuration and weights that belong together.

The weights file is put in place by one rename and carries the configuration's text: it is the save.
``adapter_config.json`` follows, for PEFT and for people. So a reader that finds it missing, or finds
the one that the save was about to replace (its hash is with the weights), takes the text beside the
weights. Any other ``adapter_config.json`` is somebody's change after the save, and is followed, as PEFT
follows it; it has to fit the weights, and a warning says what was changed.
"""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vera_fx.checkpoint.peft_config import (
    CONFIG_FILE,
    MAX_BYTES,
    config_json,
    config_of,
    differences,
    origin_of,
    parse_config,
)
from vera_fx.checkpoint.weights_file import WEIGHTS_FILE, weights_in
from vera_fx.config import AdapterConfig
from vera_fx.disk.files import moved_into, read_limited, sha256, writing
from vera_fx.disk.safetensors_file import WeightsFile
from vera_fx.errors import CheckpointError, listing, shown

CONFIG = "vera_fx.config"
"""The key of the configuration's text in the metadata of the weights."""

REPLACES = "vera_fx.replaces_config_sha256"
"""The key of the hash of the ``adapter_config.json`` that a save found and was about to replace."""

_TRIES = 100


@dataclass(frozen=True)
class Saved:
    """A saved adapter whose weights file is open; a context manager.

    Attributes:
        folder: where it is.
        config: its configuration.
        origin: what the configuration says of the base model.
        weights: its weights file.
        changed: fields of the configuration that were changed after the save.
    """

    folder: Path
    config: AdapterConfig
    origin: Mapping[str, str]
    weights: WeightsFile
    changed: list[str] = field(default_factory=list[str])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.weights.__exit__()

    def warn_of_changes(self, stacklevel: int) -> None:
        """Say what of the configuration is not what was saved with the weights."""
        if self.changed:
            warnings.warn(
                f"{self.folder / CONFIG_FILE} was changed after the adapter was saved "
                f"({listing(self.changed)}); it is followed",
                stacklevel=stacklevel + 1,
            )


def open_saved(folder: Path) -> Saved:
    """Open a saved adapter, vera_fx's or PEFT's, whoever writes to the folder meanwhile.

    Raises:
        CheckpointError: the files are missing or damaged, of another kind of adapter, or change all
            the time.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no {CONFIG_FILE} in {folder} (found: no folder)")
    for text in _texts(folder):
        weights = weights_in(folder)
        try:
            if text == _config_text(folder):
                return _together(folder, text, weights)
        except BaseException:
            weights.__exit__()
            raise
        weights.__exit__()
    raise AssertionError


def copy_saved(folder: Path, target: Path) -> list[Path]:
    """Copy a saved adapter, whoever writes to its folder meanwhile; the copies, still to be flushed.

    Raises:
        CheckpointError: files are missing or cannot be read, or they change all the time.
        OSError: the copy cannot be written.
    """
    weights, config = target / WEIGHTS_FILE, target / CONFIG_FILE
    for text in _texts(folder):
        shutil.copyfile(folder / WEIGHTS_FILE, weights)
        if text != _config_text(folder):
            continue
        if text is None:
            return [weights]
        config.write_bytes(text)
        return [weights, config]
    raise AssertionError


def _texts(folder: Path) -> Iterator[bytes | None]:
    """The configuration's text, again and again.

    The same text before and after the weights are opened was there when they were.
    """
    for _ in range(_TRIES):
        yield _config_text(folder)
    raise CheckpointError(f"{folder} is written to again and again; load it when that is over")


def is_saved(folder: Path) -> bool:
    """Whether an adapter is there, as far as the names of its files tell."""
    return any((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))


def path_of(directory: Any) -> Path:
    """A folder that a caller named.

    Raises:
        CheckpointError: it is no path.
    """
    try:
        path = Path(directory)
        os.fsencode(path)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the folder of an adapter must be a path: {error}") from error
    if "\0" in str(path):
        raise CheckpointError(f"{shown(str(path))} cannot be a folder: it holds a zero character")
    return path


def _together(folder: Path, text: bytes | None, weights: WeightsFile) -> Saved:
    inside, where = weights.metadata.get(CONFIG), str(folder / CONFIG_FILE)
    kept = None if inside is None else parse_config(inside, f"the configuration in {weights.path}")
    if kept is not None and (text is None or sha256(text) == weights.metadata.get(REPLACES)):
        where, values = f"the configuration in {weights.path}", kept
    elif text is not None:
        values = parse_config(text, where)
    else:
        raise CheckpointError(f"there is no {CONFIG_FILE} in {folder} (found: {WEIGHTS_FILE})")
    changed = [] if kept is None else differences(values, kept)
    return Saved(folder, config_of(values, where), origin_of(values), weights, changed)


def _config_text(folder: Path) -> bytes | None:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return read_limited(path, MAX_BYTES)
    except FileNotFoundError:  # just now
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_config(directory: Path) -> AdapterConfig:
    """What `AdapterConfig.from_pretrained` reads: an adapter's file, or one that is there alone."""
    folder = path_of(directory)
    if not (folder / WEIGHTS_FILE).is_file() and (text := _config_text(folder)) is not None:
        where = str(folder / CONFIG_FILE)
        values = parse_config(text, where)
        return _with_origin(config_of(values, where), origin_of(values))
    with open_saved(folder) as saved:
        return _with_origin(saved.config, saved.origin)


def _with_origin(config: AdapterConfig, origin: Mapping[str, str]) -> AdapterConfig:
    name, revision = (origin.get(key) for key in ("base_model_name_or_path", "revision"))
    return config.replace(base_model_name_or_path=name, revision=revision)


AdapterConfig.read_file = _read_config


def _write_config(config: AdapterConfig, folder: Path) -> None:
    text = config_json(config)
    try:
        with writing(folder), moved_into(folder) as aside:
            (aside / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written to: {error}") from error


AdapterConfig.write_file = _write_config
