"""Adapter names: they become parts of parameter names and of file paths."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import nn

from vera_fx.errors import AdapterError, listing, nearest

BASE = "__base__"
"""The name that stands for the plain base model in mixed batches."""

_FORBIDDEN = set('./\\:*?"<>|\0') | {chr(code) for code in range(32)}
_MAX_LENGTH = 128


class Names(Protocol):
    """Names that can be looked up without walking them, such as the keys of a ``ModuleDict``."""

    def __contains__(self, key: str, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


def check_name(name: str, taken: Names) -> None:
    """Refuse names that cannot be part of a parameter name or a file path, or are taken.

    Raises:
        AdapterError: with the reason.
    """
    if not isinstance(name, str) or not name:
        raise AdapterError(f"an adapter name must be a non-empty string, got {name!r}")
    bad = sorted(set(name) & _FORBIDDEN)
    if bad or name != name.strip() or len(name) > _MAX_LENGTH:
        raise AdapterError(
            f"{name[:80]!r} cannot be an adapter name: it must be at most {_MAX_LENGTH} characters, "
            f"without {' '.join(map(repr, bad)) or 'spaces around it'}"
        )
    if name in vars(nn.Module()):
        raise AdapterError(f"{name!r} cannot be an adapter name: torch keeps module state under it")
    if name == BASE:
        raise AdapterError(f"the adapter name {BASE!r} stands for the plain base model")
    if name in taken:
        raise AdapterError(
            f"there is an adapter called {name!r} already; delete it or choose another name"
        )


def check_known(name: str, known: Names) -> None:
    """Refuse a name that no adapter has.

    Raises:
        AdapterError: with the nearest names.
    """
    if name not in known:
        raise AdapterError(
            f"there is no adapter called {name!r}{nearest(str(name), known) or f'; known: {listing(known)}'}"
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
            "give adapter=... to name one"
        )
    return active[0]
