"""Bounds how long opening sizes may take, and shows that a capture goes on.

torch.export cannot be interrupted from outside. But it runs the model's operators one by one, and asks
itself about sizes in between: at each of these steps a look at the clock may end it. What counts is the
time of the thread on its core, so that a busy machine opens the same sizes as an idle one.
"""

import contextlib
import enum
import sys
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from vera_fx._context import holding, now, original, patched
from vera_fx._torch import SIZE_QUESTIONS
from vera_fx.base.hf import hides_progress
from vera_fx.debug import capture_seconds, shows_progress

SECONDS_PER_OPERATOR = 0.01
"""Twice what an operator takes, where open sizes cost nothing worth mentioning."""

_FIRST_LINE = 2.0
_NEXT_LINE = 0.5
_NEXT_LOGGED = 30.0
_PATCH = "questions about sizes"


class Opening(enum.Enum):
    """Which sizes above 1 a capture leaves open."""

    ALL = "every size"
    BATCH = "only the first size of each input"
    NONE = "no size"

    def opens(self, value: Tensor) -> list[int]:
        """The open dimensions of an input."""
        if self is Opening.NONE:
            return []
        dims = range(value.ndim if self is Opening.ALL else min(value.ndim, 1))
        return [dim for dim in dims if value.shape[dim] > 1]

    def next(self) -> "Opening":
        """What to try where this one takes too long."""
        return Opening.BATCH if self is Opening.ALL else Opening.NONE


class OutOfTime(BaseException):
    """A capture took longer than it may; no `Exception`, so that no model's code swallows it."""


class Clock(TorchFunctionMode):
    """Ends a capture that takes too long; inside of it, operators are counted.

    Args:
        title: what is captured, for the line that shows it.
        opening: which sizes are left open; with none a capture may take any time.
    """

    def __init__(self, title: str, opening: Opening) -> None:
        super().__init__()
        seconds = capture_seconds()
        limited = opening is not Opening.NONE and seconds
        self._seconds = seconds if limited else float("inf")
        self._started, self._operators = time.thread_time(), 0
        self._line = Line(title)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operators += 1
        self.look()
        return func(*args, **(kwargs or {}))

    def look(self) -> None:
        """Look at the clock.

        Raises:
            OutOfTime: the time is up.
        """
        self._line.show(self._operators)
        allowed = self._seconds + SECONDS_PER_OPERATOR * self._operators
        if time.thread_time() - self._started > allowed:
            raise OutOfTime

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block torch's questions about sizes look at this clock."""
        try:
            with patched(_PATCH, _watched), holding("clock", self):
                yield
        finally:
            self._line.end()


def _watched() -> dict[tuple[Any, str], Any]:
    return {place: _looking(*place) for place in SIZE_QUESTIONS}


def _looking(owner: Any, name: str) -> Any:
    def ask(*args: Any, **kwargs: Any) -> Any:
        clock = now("clock")
        if clock is not None:
            clock.look()
        return original(_PATCH, owner, name)(*args, **kwargs)

    return ask


class Line:
    """One line on a terminal, from the second second on; elsewhere a line now and then."""

    def __init__(self, title: str) -> None:
        self._title, self._started = title, time.monotonic()
        self._next = _FIRST_LINE
        self._shown = False

    def show(self, operators: int) -> None:
        """Show how far the capture is, if it is time to."""
        seconds = time.monotonic() - self._started
        if seconds < self._next:
            return
        on_terminal = sys.stderr.isatty()
        self._next = seconds + (_NEXT_LINE if on_terminal else _NEXT_LOGGED)
        if not shows_progress() or hides_progress():
            return
        text = f"vera_fx: capturing {self._title}: {seconds:.0f} s, {operators} operators"
        self._write(f"\r{text}\x1b[K" if on_terminal else f"{text}\n")
        self._shown = on_terminal

    def end(self) -> None:
        """Take the line away."""
        if self._shown:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed stream
            sys.stderr.write(text)
            sys.stderr.flush()
