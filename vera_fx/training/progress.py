"""Live progress of many jobs: one row each, drawn over the last ones on a terminal."""

import sys
import time
from collections.abc import Iterable
from typing import TextIO

from vera_fx.training.job import Job
from vera_fx.training.results import aligned, number

_COLUMNS = ("job", "status", "step", "loss", "held out", "accuracy", "tokens/s", "left")
_TERMINAL, _LOG = 0.5, 30.0


class ProgressRows:
    """Writes a row per job: every half second on a terminal, every half minute elsewhere."""

    def __init__(self, file: TextIO | None = None) -> None:
        """Args: where to; None for the standard error output."""
        self._file = file or sys.stderr
        self._live = self._file.isatty()
        self._drawn, self._last = 0, float("-inf")

    def show(self, jobs: Iterable[Job], *, now: bool = False) -> None:
        """Write the rows if it is time to, or ``now``."""
        clock = time.monotonic()
        if not now and clock - self._last < (_TERMINAL if self._live else _LOG):
            return
        self._last = clock
        lines = aligned([_COLUMNS, *map(_row, jobs)])
        back = f"\x1b[{self._drawn}A\x1b[J" if self._live and self._drawn else ""
        self._file.write(back + "\n".join(lines) + "\n")
        self._file.flush()
        self._drawn = len(lines)


def _row(job: Job) -> tuple[str, ...]:
    found = job.progress
    speed = f"{found.tokens / found.seconds:,.0f}" if found.seconds else ""
    each = found.seconds / found.step if found.step else 0.0
    left = f"{each * (job.settings.steps - found.step):.0f} s" if job.runs and each else ""
    share = "" if found.accuracy is None else f"{found.accuracy:.1%}"
    steps = f"{found.step}/{job.settings.steps}"
    return (
        job.name,
        found.status,
        steps,
        number(found.loss),
        number(found.held_out),
        share,
        speed,
        left,
    )
