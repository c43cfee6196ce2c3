"""One safetensors file, opened once: its header is checked before a byte of its tensors is read.

Header and data come from one open, so a file that is replaced in between is read as it was; the
tensors are read into memory of their own, so a file that is cut short in between cannot end the
process, as a mapped one does. Everything in the file but the hash itself is hashed.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vera_fx.errors import CheckpointError, shown

SHA256 = "vera_fx.sha256"
"""The key of the hash over all tensors and all other metadata of a file."""

MAX_HEADER = 64 << 20
_MAX_DIMENSIONS = 8
_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """A tensor of a file: its key there, what it is, and where its bytes are behind the header."""

    key: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    end: int


@dataclass(frozen=True)
class WeightsFile:
    """An open file whose header has been checked; a context manager.

    Attributes:
        path: where it is.
        entries: its tensors, by their keys as they are known here.
        metadata: its metadata.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    _file: Any
    _begin: int
    _status: os.stat_result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def read(self) -> dict[str, Tensor]:
        """All tensors, in memory of their own, after their hash has been checked if the file has one.

        Raises:
            CheckpointError: they are not what was hashed, the file was changed in between, or there
                is no memory for them.
        """
        try:
            state = {key: self._tensor(entry) for key, entry in self.entries.items()}
        except (OSError, RuntimeError, MemoryError) as error:
            raise CheckpointError(f"{self.path} could not be read: {error}") from error
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise CheckpointError(f"{self.path} was written to while it was read; load it again")
        known, keys = self.metadata.get(SHA256), {k: entry.key for k, entry in self.entries.items()}
        found = {keys[key]: tensor for key, tensor in state.items()}
        if known is not None and known != digest(found, self.metadata):
            raise CheckpointError(
                f"{self.path} is damaged: its tensors are not those that were saved (SHA-256 in its "
                f"metadata, {SHA256!r}); whoever changed them on purpose saves them without it"
            )
        return state

    def _tensor(self, entry: Entry) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view, done = _bytes_of(tensor), 0
        self._file.seek(self._begin + entry.start)
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise OSError("it became shorter while it was read")
            done += count
        return tensor


def open_weights(path: Path, known_as: Callable[[str], str]) -> WeightsFile:
    """Open a file and check its header.

    Args:
        path: the file.
        known_as: what a key of the file is called here.

    Raises:
        CheckpointError: it is no safetensors file, or holds what no adapter does.
        OSError: it cannot be opened.
    """
    file = path.open("rb", buffering=0)
    try:
        status = os.fstat(file.fileno())
        header, begin = _header(file, status.st_size)
        found, metadata = _checked(header, status.st_size - begin)
        entries = unique((known_as(entry.key), entry) for entry in found)
        return WeightsFile(path, entries, metadata, file, begin, status)
    except (ValueError, RecursionError, OSError) as error:
        file.close()
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over keys, dtypes, shapes and bytes of all tensors, and over the metadata without it."""
    others = sorted((key, text) for key, text in metadata.items() if key != SHA256)
    found = hashlib.sha256(json.dumps(others).encode())
    for key, tensor in sorted(tensors.items()):
        found.update(json.dumps([key, _NAMES.get(tensor.dtype), list(tensor.shape)]).encode())
        found.update(_bytes_of(tensor))
    return found.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _header(file: Any, size: int) -> tuple[bytes, int]:
    """The header's text, and where the data begins."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"its header has {length} bytes, the file {size}")
    return file.read(length), 8 + length


def _checked(header: bytes, size: int) -> tuple[list[Entry], dict[str, str]]:
    values = json.loads(header.decode(), object_pairs_hook=unique)
    if not isinstance(values, dict):
        raise ValueError("its header is no object")  # noqa: TRY004  # of the file, not of an argument
    metadata = values.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise ValueError("its metadata is no object of strings")
    entries = [_entry(key, value) for key, value in values.items()]
    end = 0
    for entry in sorted(entries, key=lambda entry: entry[-2:]):
        if entry.start != end:
            raise ValueError(f"{shown(entry.key)} does not begin where the tensor before it ends")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, the file {size}")
    return entries, metadata


def _entry(key: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(key)} is not described by dtype, shape and data_offsets")
    name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"{shown(key)} is of dtype {shown(name)}, and no tensor of an adapter is")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or not _are_sizes(offsets):
        raise ValueError(f"{shown(key)} has a shape or offsets that are no sizes")
    start, end = offsets if len(offsets) == 2 else (0, -1)  # noqa: PLR2004
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{shown(key)} has {end - start} bytes, which {shown(shape)} does not fill"
        )
    return Entry(key, dtype, torch.Size(shape), start, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**62 for value in values
    )


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON as a dictionary.

    Raises:
        ValueError: a key is there twice: readers differ in which of the two they take.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} is there twice")
        found[key] = value
    return found
