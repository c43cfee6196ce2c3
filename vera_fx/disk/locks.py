"""Locks that end with their process, however it ends: a killed writer holds nothing up."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 60.0
"""Seconds that a writer waits for another."""

_PAUSE = 0.005


class HeldError(OSError):
    """Somebody alive has had the lock for too long."""


if sys.platform == "win32":
    import msvcrt

    def _claim(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _claim(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(path: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Inside the block nobody else is inside a block for the same path, in any thread or process.

    The file at ``path`` is there as long as the block. The system keeps the lock, on the file as it is
    open here, so that it ends with the process; a file that a killed process left is taken over.

    Args:
        path: the lock's file; its folder must exist.
        patience: seconds to wait for others.

    Raises:
        HeldError: others have held it for that long.
        OSError: the file cannot be made.
    """
    end = time.monotonic() + patience
    while (file := _taken(path, os.O_CREAT)) is None:
        if time.monotonic() > end:
            raise HeldError(f"{path} has been held for {patience:g} s by {_owner(path)}")
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        _let_go(path, file)


def take_dead(path: Path) -> bool:
    """Remove a lock's file if nobody alive holds it: whether that is so, or there was none."""
    try:
        file = _taken(path, 0)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    if file is None:
        return False
    _let_go(path, file)
    return True


def _taken(path: Path, flags: int) -> int | None:
    """The file, opened and locked; None if others hold it or have just removed it."""
    file = os.open(path, os.O_RDWR | flags, 0o666)
    try:
        _claim(file)
        if os.path.samestat(os.fstat(file), path.stat()):
            _sign(file)
            return file
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass
    except OSError:  # a file system without locks: writers go on, and nobody is taken for dead
        if flags:
            return file
    os.close(file)
    return None


def _sign(file: int) -> None:
    with contextlib.suppress(OSError):  # it is for people only, and the disk may be full
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")[:100] or "another process"
    return "another process"


def _let_go(path: Path, file: int) -> None:
    # In this order: whoever opens the file now and locks it later sees that it is gone.
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(file)
