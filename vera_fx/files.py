"""Files that appear whole or not at all: written aside, then moved into place."""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast


@contextlib.contextmanager
def moved_into(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files replace those of ``folder`` when the block ends well.

    After an error in the block the files of ``folder`` are what they were.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield aside
        for path in sorted(aside.iterdir(), reverse=True):  # the weights before their description
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for path in sorted(aside.iterdir(), reverse=True):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_synced(source: Path, target: Path) -> None:
    """Copy a file, so that what is there afterwards survives a crash of the machine.

    Raises:
        OSError: the source is missing, or the target cannot be written.
    """
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


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
