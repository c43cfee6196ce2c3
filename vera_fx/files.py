"""Files that appear whole or not at all: written aside, then moved into place."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
