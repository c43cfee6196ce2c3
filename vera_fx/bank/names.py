"""Adapter names, checked in one place: they become parts of parameter names and of file paths."""

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import nn

from vera_fx.errors import AdapterError, listing, nearest, shown

BASE = "__base__"
"""The name that stands for the plain base model in mixed batches."""

_FORBIDDEN = set('./\\:*?"<>|')
_MAX_LENGTH = 128
_MAX_BYTES = 255
"""What file systems hold in one part of a path."""

# What Windows opens in place of a file of that name, whatever the folder.
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_DEVICES |= {f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³"}
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}


class Names(Protocol):
    """Names that can be looked up without walking them, such as the keys of a ``ModuleDict``."""

    def __contains__(self, key: str, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


def check_name(name: str, taken: Names, *, as_file: bool = False) -> None:
    """Refuse names that cannot be part of a parameter name or a file path, or are taken.

    Args:
        name: the name.
        taken: those that are taken.
        as_file: whether a name is taken as well if some file systems take another for it.

    Raises:
        AdapterError: with the reason.
    """
    if not isinstance(name, str) or not name:
        raise AdapterError(f"an adapter name must be a non-empty string, got {shown(name)}")
    bad = sorted(c for c in set(name) if c in _FORBIDDEN or unicodedata.category(c) in _UNPRINTABLE)
    if bad or name != name.strip() or len(name) > _MAX_LENGTH:
        raise AdapterError(
            f"{shown(name)} cannot be an adapter name: it must be at most {_MAX_LENGTH} characters, "
            f"without {' '.join(map(repr, bad[:8])) or 'spaces around it'}"
        )
    _check_file_name(name)
    if name in vars(nn.Module()):
        raise AdapterError(f"{name!r} cannot be an adapter name: torch keeps module state under it")
    if name == BASE:
        raise AdapterError(f"the adapter name {BASE!r} stands for the plain base model")
    if name in taken:
        raise AdapterError(
            f"there is an adapter called {name!r} already; delete it or choose another name"
        )
    if as_file:
        check_apart([*taken, name])


def _check_file_name(name: str) -> None:
    try:
        size = max(len(os.fsencode(name)), len(name.encode()))
    except UnicodeEncodeError as error:
        raise AdapterError(
            f"{shown(name)} cannot be an adapter name: file names here cannot hold {name[error.start]!r}"
        ) from error
    if size > _MAX_BYTES:
        raise AdapterError(
            f"{shown(name)} cannot be an adapter name: it has {size} bytes as a file name, and file "
            f"systems hold {_MAX_BYTES}"
        )
    if name.casefold() in _DEVICES:
        raise AdapterError(f"{name!r} cannot be an adapter name: on Windows it names a device")


def check_apart(names: Iterable[str]) -> None:
    """Refuse names of which some file systems take one for another: they do not tell cases apart.

    Raises:
        AdapterError: with two of them.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(_folded(name), name)
        if other != name:
            raise AdapterError(
                f"the adapter names {shown(other)} and {shown(name)} are one to file systems that do not "
                "tell upper from lower case; choose another name"
            )


def _folded(name: str) -> str:
    """The name as file systems that fold cases and accents compare it."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def check_known(name: str, known: Names) -> None:
    """Refuse a name that no adapter has.

    Raises:
        AdapterError: with the nearest names.
    """
    if not isinstance(name, str) or name not in known:
        hint = nearest(name, known) if isinstance(name, str) else ""
        raise AdapterError(
            f"there is no adapter called {shown(name)}{hint or f'; known: {listing(known)}'}"
        )


def one_adapter(known: Names, active: Sequence[str], name: str | None) -> str:
    """The adapter asked for, or the one that is active.

    Raises:
        AdapterError: an unknown name; or none was given and not exactly one adapter is active.
    """
    if name is not None:
        check_known(name, known)
        return name
    if len(active) != 1:
        raise AdapterError(
            f"which adapter? {len(active)} are active ({listing(active)}) of {listing(known)}; "
            "give adapter_name=... to name one"
        )
    return active[0]
