"""A folder of adapters that serve a model by name, loaded when they are first asked for."""

import contextlib
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vera_fx._renamed import renamed
from vera_fx.bank.names import check_name
from vera_fx.bank.packed import Packed
from vera_fx.checkpoint.packing import Packer
from vera_fx.checkpoint.saved import copy_saved, is_saved, path_of
from vera_fx.disk import files
from vera_fx.errors import AdapterError, CheckpointError, VeraFxError, first_line, listing, nearest
from vera_fx.graphs.runtime import require_adapted
from vera_fx.mixing.check import STORE
from vera_fx.processes.wrapped import unwrapped


@dataclass(slots=True)
class StoreCounts:
    """What a store has done so far.

    Attributes:
        loads: adapters read from disk.
        hits: adapters that were asked for and in memory.
        evictions: adapters dropped from memory to stay within the capacity.
        failures: adapters that could not be read.
    """

    loads: int = 0
    hits: int = 0
    evictions: int = 0
    failures: int = 0


@dataclass(slots=True)
class _Reading:
    """An adapter that some thread reads and others wait for; over once it is read or deleted."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    over: bool = False


class AdapterStore:
    """Serves ``adapter_names`` from a folder with one saved adapter per sub-folder.

    ``model(..., adapter_names=[...])`` and ``generate`` find every name that is no adapter of the
    bank here. An adapter is read from disk when it is first named and stays in memory until `capacity`
    others have been used since. It is plain data: nothing is captured or compiled for it. Its projections,
    targets and trained copies must be among those of the bank's own adapters: one of each kind, loaded
    by `vera_fx.load_adapter`, is enough.

    Every method may be called from any thread while the model serves. One lock guards the table of
    what is in memory and is never held while a file is read; a running batch keeps the tensors that
    it took, whatever happens to the store. Functions that change the bank (`merge`...) are not covered.
    """

    def __init__(
        self, model: nn.Module, folder: str | os.PathLike[str], *, capacity: int = 1024
    ) -> None:
        """Attach a store to an adapted model, in place of the one it had.

        Args:
            model: an adapted model.
            folder: the folder; made if it does not exist.
            capacity: how many adapters to keep in memory; batches that run may pin others beside.

        Raises:
            AdapterError: the model is not adapted, or the capacity is no positive number.
            CheckpointError: the folder cannot be made.
        """
        self._bank = require_adapted(model := unwrapped(model))
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise AdapterError(f"capacity must be a positive whole number, got {capacity!r}")
        self.folder, self.capacity = path_of(folder), capacity
        try:
            files.make_folder(self.folder)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be a store's folder: {error}") from error
        files.sweep(self.folder)
        self.counts = StoreCounts()
        self._packer = Packer(model)
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Packed] = OrderedDict()
        self._readings: dict[str, _Reading] = {}
        self._pins: Counter[str] = Counter()
        self._bank.__dict__[STORE] = self

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        # A store belongs to one model object; a copy of the model needs its own.
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __contains__(self, name: object) -> bool:
        """True if there is an adapter of that name, in memory or on disk."""
        if not isinstance(name, str):
            return False
        with contextlib.suppress(AdapterError):
            return name in self._loaded or is_saved(self._path(name))
        return False

    def names(self) -> list[str]:
        """The names of all adapters in the folder, sorted."""
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
        return []

    def loaded(self) -> list[str]:
        """The names of those in memory, the one that will be dropped first in front."""
        with self._lock:
            return list(self._loaded)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of all adapters in memory."""
        with self._lock:
            return sum(packed.bytes for packed in self._loaded.values())

    @renamed(name="adapter_name")
    def load(self, adapter_name: str) -> None:
        """Read an adapter into memory ahead of its first use.

        Raises:
            AdapterError: there is no such adapter, or it was deleted in the meantime.
            CheckpointError: its files are damaged or do not fit the bank. Others are not affected.
        """
        self.take([adapter_name])

    @renamed(name="adapter_name")
    def drop(self, adapter_name: str) -> None:
        """Forget an adapter in memory, so that its next use reads the files again."""
        with self._lock:
            self._loaded.pop(adapter_name, None)

    @renamed(names="adapter_names")
    def take(self, adapter_names: Sequence[str]) -> Mapping[str, Packed]:
        """The adapters of those names, loaded where they are not in memory.

        Raises:
            AdapterError: more names than the capacity, or an unknown one.
            CheckpointError: files that are damaged or do not fit the bank.
        """
        with self.pinned(adapter_names):
            return {name: self._get(name) for name in adapter_names}

    @renamed(names="adapter_names")
    @contextlib.contextmanager
    def pinned(self, adapter_names: Iterable[str]) -> Iterator[None]:
        """Inside the block none of the names is dropped from memory to make room for others.

        Raises:
            AdapterError: there are more names than the capacity.
        """
        names = set(adapter_names)
        if len(names) > self.capacity:
            raise AdapterError(
                f"a batch asked for {len(names)} different adapters of a store that keeps "
                f"{self.capacity} in memory; split the batch or give the store a larger capacity"
            )
        with self._lock:
            self._pins.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._pins -= Counter(names)
                self._make_room()

    @renamed(name="adapter_name")
    def add(self, adapter_name: str, source: str | os.PathLike[str]) -> None:
        """Take a copy of a saved adapter into the folder, after it has been read and checked.

        Raises:
            AdapterError: the name is taken or cannot be used.
            CheckpointError: the files are missing, damaged or do not fit, or cannot be written.
                The folder is what it was before.
        """
        self._check_free(adapter_name)
        try:
            with files.aside(self.folder, "adding") as temporary:
                copies = copy_saved(path_of(source), temporary)
                self._read(adapter_name, temporary)
                for path in copies:
                    files.flush(path)
                with self._lock:
                    self._check_free(adapter_name)
                    temporary.rename(self.folder / adapter_name)
                files.flush_folder(self.folder)
        except OSError as error:
            raise CheckpointError(f"{adapter_name!r} could not be added: {error}") from error

    @renamed(name="adapter_name")
    def delete(self, adapter_name: str) -> None:
        """Delete an adapter from memory and disk. Batches that run with it end well.

        Raises:
            AdapterError: there is no such adapter, or its files cannot be deleted.
        """
        path = self._path(adapter_name)
        with self._lock:
            try:
                gone = files.put_away(path)
            except FileNotFoundError:
                raise self._unknown(adapter_name) from None
            except OSError as error:
                raise AdapterError(f"{adapter_name!r} cannot be deleted: {error}") from error
            self._loaded.pop(adapter_name, None)
            if adapter_name in self._readings:
                self._readings.pop(adapter_name).over = True
        files.remove(gone)

    def _check_free(self, name: str) -> None:
        check_name(name, [*self._bank.adapters, *self.names()], as_file=True)

    def _path(self, name: str) -> Path:
        check_name(name, ())
        return self.folder / name

    def _unknown(self, name: str) -> AdapterError:
        hint = nearest(name, known := self.names()) or f"; known: {listing(known)}"
        return AdapterError(
            f"there is no adapter called {name!r} in {self.folder}, or it was deleted{hint}"
        )

    def _get(self, name: str) -> Packed:
        while True:
            found, reading = self._look(name)
            if found is not None:
                return found
            with reading.lock:  # one thread reads, the others wait for it
                if not reading.over:
                    packed = self._read_or_forget(name, reading)
                    if packed is not None:
                        return packed

    def _look(self, name: str) -> tuple[Packed | None, _Reading]:
        with self._lock:
            found = self._loaded.get(name)
            if found is not None and self._packer.fits(found):
                self._loaded.move_to_end(name)
                self.counts.hits += 1
                return found, _Reading()
            self._loaded.pop(name, None)
            return None, self._readings.setdefault(name, _Reading())

    def _read_or_forget(self, name: str, reading: _Reading) -> Packed | None:
        """The adapter, kept; None if it was deleted while it was read, which may look like damage."""
        error = None
        try:
            packed = self._read(name, self._path(name))
        except VeraFxError as found:
            packed, error = None, found
        with self._lock:
            if reading.over:
                return None
            self._readings.pop(name).over = True
            if packed is not None:
                self._loaded[name] = packed
                self._make_room()
            self.counts.failures += isinstance(error, CheckpointError)
        if error is not None:
            raise error
        return packed

    def _read(self, name: str, path: Path) -> Packed:
        while (place := files.identity(path)) is not None:
            try:
                packed = self._packer.read(path)
            except Exception as error:
                if (
                    files.identity(path) != place
                ):  # another process has deleted it, which looks like damage
                    continue
                if isinstance(error, VeraFxError):
                    raise
                raise CheckpointError(
                    f"adapter {name!r} in {path} cannot be read: {first_line(error)}"
                ) from error
            with self._lock:
                self.counts.loads += 1
            return packed
        raise self._unknown(name)

    def _make_room(self) -> None:
        """Drop the adapters that were not used for longest; those of running batches stay."""
        excess = len(self._loaded) - self.capacity
        if excess > 0:
            free = (name for name in self._loaded if not self._pins.get(name))
            for name in [name for name, _ in zip(free, range(excess), strict=False)]:
                del self._loaded[name]
                self.counts.evictions += 1
