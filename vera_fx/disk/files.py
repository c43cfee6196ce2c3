"""Files that appear whole or not at all: written aside, flushed, then moved into place."""

import contextlib
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

from vera_fx.disk.locks import locked, take_dead

_ASIDE = re.compile(r"\.vera_fx-(?:saving|adding|deleted)-[0-9a-f]{16}")
_LOCK = ".lock"
_WRITERS = ".vera_fx.lock"
# What version 0.1 left behind, which knew no locks: by its names and contents, after a day.
_OLD = re.compile(r"\.(?:saving|adding)-[a-z0-9_]{8}|\.deleted-\d+-\d+-.+")
_OLD_FILES = re.compile(r"adapter_config\.json|adapter_model\.safetensors|README\.md|.+\.pt2")
_DAY = 86_400.0


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside the block no other writer of this library changes the files of ``folder``.

    Raises:
        OSError: the folder cannot be made or written to, or another writer does not come to an end.
    """
    make_folder(folder)
    with locked(folder / _WRITERS):
        yield


@contextlib.contextmanager
def aside(folder: Path, purpose: str = "saving") -> Iterator[Path]:
    """A new folder inside ``folder``, to write to; gone at the end, unless it was moved.

    What killed processes left there is removed first.

    Raises:
        OSError: it cannot be made.
    """
    sweep(folder)
    path = _new(folder, purpose)
    # Beside and not inside, so that the folder may be moved as it is.
    with locked(_lock_of(path)):
        try:
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _new(folder: Path, purpose: str) -> Path:
    return folder / f".vera_fx-{purpose}-{secrets.token_hex(8)}"


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + _LOCK)


def sweep(folder: Path) -> None:
    """Remove what writers left in ``folder`` that are surely dead: their locks have ended with them."""
    found = list[Path]()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found += (Path(entry.path) for entry in entries if entry.name.startswith("."))
    for path in found:
        with contextlib.suppress(OSError):
            if _is_dead(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_dead(path: Path) -> bool:
    """Whether ``path`` is a folder that nobody alive writes to; a lock without a folder is removed."""
    if _ASIDE.fullmatch(path.name):
        return take_dead(_lock_of(path))
    folder = path.with_name(path.name.removesuffix(_LOCK))
    if _ASIDE.fullmatch(folder.name) and not folder.exists():
        take_dead(path)
    own = _OLD.fullmatch(path.name) and all(_OLD_FILES.fullmatch(p.name) for p in path.iterdir())
    return bool(own) and time.time() - path.stat().st_mtime > _DAY


@contextlib.contextmanager
def moved_into(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files replace those of ``folder`` when the block ends well.

    After an error in the block, or if the process is killed in it, the files of ``folder`` are what
    they were. Each file is replaced whole.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    make_folder(folder)
    with aside(folder) as temporary:
        yield temporary
        # What a description speaks of comes before it.
        names = sorted((path.name for path in temporary.iterdir()), reverse=True)
        for name in names:
            flush(temporary / name)
        for name in names:
            put(temporary / name, folder / name)


def put(source: Path, target: Path) -> None:
    """Move a flushed file into place: one rename, which survives a crash of the machine.

    Raises:
        OSError: it cannot be moved.
    """
    source.replace(target)
    flush_folder(target.parent)


def flush(path: Path) -> None:
    """Bring a file's content to the disk.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Bring a folder's list of files to the disk, where the system knows how."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and needs it not
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are missing.

    Raises:
        OSError: it cannot be made.
    """
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        flush_folder(folder.parent)


def folds_case(folder: Path) -> bool:
    """Whether the file system takes ``a`` and ``A`` for one name.

    Raises:
        OSError: the folder cannot be written to.
    """
    with aside(folder) as temporary:
        (temporary / "a").touch()
        return (temporary / "A").exists()


def read_limited(path: Path, limit: int) -> bytes:
    """A file's content, read by one open.

    Raises:
        ValueError: it has more than ``limit`` bytes.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return data


def sha256(data: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from one that takes its place; None if there is no folder."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def put_away(folder: Path) -> Path:
    """Take a folder from its place by one rename; where it is now, to be removed.

    Raises:
        OSError: it cannot be moved.
    """
    gone = _new(folder.parent, "deleted")
    folder.rename(gone)
    flush_folder(folder.parent)
    return gone


def remove(folder: Path) -> None:
    """Delete a folder that was put away. What is left of it is swept later."""
    shutil.rmtree(folder, ignore_errors=True)


class _Archive(io.RawIOBase):
    """What torch writes its archives to: never fails, keeps the first error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)  # AOTInductor's packager rewinds when it is done

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)


@contextlib.contextmanager
def archive_at(path: Path) -> Iterator[IO[bytes]]:
    """A new file for torch's archive writer, which ends the process if a write of its own fails.

    Raises:
        OSError: the file cannot be made, or did not take all that was written (a full disk).
    """
    with path.open("wb") as file:
        archive = _Archive(file)
        yield cast("IO[bytes]", archive)
        if archive.error is not None:
            raise archive.error
