"""What can go wrong, as the library's own exceptions.

Every message says what was asked, what was found and what to do.
"""

import difflib
import itertools
from collections.abc import Iterable

_LONGEST = 8_000
"""Characters of a message. What a file or a caller brings may be of any size."""

_SHOWN = 200
_COMPARED = 2_000


class VeraFxError(Exception):
    """Base of all errors raised by vera_fx."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_cut(a, _LONGEST) if isinstance(a, str) else a for a in args))


class ConfigError(VeraFxError, ValueError):
    """A configuration value that cannot be used."""


class TargetError(VeraFxError, ValueError):
    """The configured targets do not fit the model, or a target cannot be adapted."""


class AdapterError(VeraFxError, ValueError):
    """An adapter name that is unknown, taken or not usable, or a step out of order."""


class CaptureError(VeraFxError, RuntimeError):
    """A call of the model could not be captured as a graph."""


class LengthError(VeraFxError, IndexError, RuntimeError):
    """A text with more tokens than the model has positions for; also what torch raises there itself."""


class CheckpointError(VeraFxError, ValueError):
    """Adapter files that are missing, damaged or do not fit the model."""


class ExportError(VeraFxError, ValueError):
    """An adapted model that cannot become a program of its own, or a program that does not fit."""


class PassError(VeraFxError, RuntimeError):
    """A pass failed on a graph: a fault of the library. It names the pass and the site."""


class RequantisedWarning(UserWarning):
    """Weights were quantised again with an adapter in them, which lost a part of it."""


class PartialCaptureWarning(UserWarning):
    """A model, or a part of it, runs in Python because it cannot be captured as one graph."""


def shown(value: object, *, limit: int = _SHOWN) -> str:
    """``repr(value)``, cut where it is long; never fails."""
    try:
        return _cut(repr(value), limit)
    except Exception:  # integers of more digits than Python prints, and reprs of others' making
        return f"<{type(value).__name__} that cannot be shown>"


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    end = limit // 4  # where messages say what to do
    return f"{text[: limit - end]} ...({len(text) - limit} characters more)... {text[-end:]}"


class CaptureCacheWarning(UserWarning):
    """A capture is not kept, or a kept one is not used, and why."""


class FixedSizesWarning(UserWarning):
    """Leaving every size of a call open took too long: calls of other sizes are captured anew."""


def nearest(word: str, known: Iterable[str], *, limit: int = 3) -> str:
    """``"; did you mean 'a', 'b'?"`` for the known words closest to ``word``, or nothing."""
    some = list(itertools.islice(known, _COMPARED))
    matches = difflib.get_close_matches(word[:_SHOWN], some, n=limit, cutoff=0.5)
    return f"; did you mean {', '.join(map(shown, matches))}?" if matches else ""


def listing(names: Iterable[str], *, limit: int = 8) -> str:
    """The names as readable text, cut after ``limit``."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shown, names[:limit])) + rest if names else "none"


def first_line(error: BaseException) -> str:
    """An error of another library in one line: its class and the first line of its message."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {_cut(lines[0].rstrip(), 2 * _SHOWN)}"
