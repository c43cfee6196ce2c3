"""What came of many jobs: a table for people, JSON for programs."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vera_fx.checkpoint.saved import path_of
from vera_fx.disk.files import moved_into
from vera_fx.errors import CheckpointError
from vera_fx.training.job import Progress

_COLUMNS = ("job", "status", "step", "loss", "held out", "accuracy", "tokens", "tokens/s")


@dataclass(frozen=True)
class TrainResults(Mapping[str, Progress]):
    """The jobs of `train_many` by name, each with its status, losses and figures.

    Attributes:
        jobs: how far each job came.
        seconds: of the whole run, what came before a resumption included.
        passes: passes through the base.
        padding: share of the tokens in these passes that were padding.
        writes: whether `save` writes; of several processes the first alone does.
    """

    jobs: Mapping[str, Progress]
    seconds: float
    passes: int
    padding: float
    writes: bool = True

    def __getitem__(self, name: str) -> Progress:
        return self.jobs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)

    def __str__(self) -> str:
        rows = [_COLUMNS, *(line_of(name, found) for name, found in self.jobs.items())]
        end = (
            f"{len(self.jobs)} jobs in {self.seconds:.1f} s, {self.passes} passes through the base, "
            f"{self.padding:.0%} padding"
        )
        return "\n".join((*aligned(rows), end))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "jobs": {name: found.as_dict() for name, found in self.jobs.items()},
            "seconds": self.seconds,
            "passes": self.passes,
            "padding": self.padding,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the results as JSON: the old file or the new one, whole.

        In several processes the first writes, and the others do nothing.

        Raises:
            CheckpointError: the file cannot be written.
        """
        target = path_of(path)
        if not self.writes:
            return
        try:
            with moved_into(target.parent) as folder:
                text = json.dumps(self.as_dict(), indent=2) + "\n"
                (folder / target.name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error


def line_of(name: str, found: Progress) -> tuple[str, ...]:
    """One job's cells."""
    speed = found.tokens / found.seconds if found.seconds else 0.0
    return (
        name,
        found.status,
        str(found.step),
        number(found.loss),
        number(found.held_out),
        "" if found.accuracy is None else f"{found.accuracy:.1%}",
        f"{found.tokens:,}",
        f"{speed:,.0f}",
    )


def number(value: float | None) -> str:
    """A loss, or nothing."""
    return "" if value is None else f"{value:.4f}"


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Cells under each other."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
