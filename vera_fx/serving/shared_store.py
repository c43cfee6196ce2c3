"""A store whose folder other processes change as well: replicas on one machine or on many."""

import os
from pathlib import Path
from typing import Any

from torch import nn

import vera_fx
from vera_fx.checkpoint.peft_config import CONFIG_FILE
from vera_fx.checkpoint.saved import is_saved
from vera_fx.checkpoint.weights_file import WEIGHTS_FILE

Stamp = tuple[tuple[int, int, int, int] | None, ...]


class SharedStore(vera_fx.AdapterStore):
    """An `AdapterStore` that looks at an adapter's files at every use.

    What is in memory serves as long as the files are those that were read; an adapter that was replaced is
    read again, one that was deleted is unknown, whoever did it. That costs two calls of ``stat`` for each
    name of a batch, 4 us on a local disk. Over a network it sees what the file system shows: NFS may
    keep what it knew of a file for some seconds.
    """

    def __init__(
        self, model: nn.Module, folder: str | os.PathLike[str], *, capacity: int = 1024
    ) -> None:
        super().__init__(model, folder, capacity=capacity)
        self._stamps: dict[str, Stamp] = {}

    def __contains__(self, name: object) -> bool:
        """True if there is an adapter of that name on disk."""
        try:
            return isinstance(name, str) and is_saved(self._path(name))
        except vera_fx.AdapterError:
            return False

    def _look(self, name: str) -> Any:
        # Before the table is looked at: what is read later than this is at least as new.
        if self._stamps.get(name) != _stamp(self._path(name)):
            self.drop(name)
        return super()._look(name)

    def _read(self, name: str, path: Path) -> Any:
        # Before the files are read: a save in the middle leaves another stamp, and a second reading.
        stamp = _stamp(path)
        packed = super()._read(name, path)
        if path == self._path(name):  # and not a copy that is being added
            self._stamps[name] = stamp
        return packed


def _stamp(folder: Path) -> Stamp:
    """What changes when one of an adapter's files is replaced or written to."""
    return tuple(_of_file(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE))


def _of_file(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
