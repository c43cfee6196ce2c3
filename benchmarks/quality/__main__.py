"""Trains what docs/quality.md shows: python -m benchmarks.quality --minutes 60; goes on where it stopped.

Each run is a process forked from this one, so that what it holds is its own. Linux only.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.quality import grid
from benchmarks.quality.results import FILE, append, read
from benchmarks.quality.tasks import DOMAINS, task
from benchmarks.quality.training import Run


def apart(work: Callable[[], grid.Results]) -> grid.Results:
    """Do the work in a forked process.

    Raises:
        RuntimeError: it ended without a result; what it said is on the standard error output.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("a run ended without a result; see above") from None
    finally:
        process.join()


def _child(work: Callable[[], grid.Results], sender: Connection) -> None:
    sender.send(work())


def warm_up() -> None:
    """Import and read once what every run needs."""
    import peft  # noqa: F401

    for name in (*DOMAINS, "digits"):
        task(name)


def slice_jobs() -> list[grid.Job]:
    """The smallest run of everything: digits, one seed, two rates in one batch and two methods alone."""
    first = Run("sweep", "digits", "VeRA r=64", 0.0, 0, "validation")
    runs = [Run("images", "digits", name, 1e-2, 0) for name in ("head", "LoRA r=8")]
    return [grid.together(first, (1e-2, 3e-2)), *map(grid.single, runs)]


def main(
    minutes: Annotated[float, typer.Option(help="stop after this; 0 to go on to the end")] = 0,
    output: Annotated[Path, typer.Option(help="a .jsonl file that is added to")] = FILE,
    slice_only: Annotated[bool, typer.Option("--slice", help="a minute of it, for CI")] = False,
    backwards: Annotated[
        bool, typer.Option("--backwards", help="last runs first: a second process beside a first")
    ] = False,
) -> None:
    """Do what is not done yet."""
    torch.set_num_threads(1)
    if not slice_only:
        warm_up()
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    while time.monotonic() < end:
        results = read(output)
        left = [
            job
            for job in (slice_jobs() if slice_only else grid.jobs(results))
            if any(key not in results for key in job.keys)
        ]
        if not left:
            print("all runs are done")
            return
        found = apart(left[-1 if backwards else 0].work)
        append(output, found)
        for key, result in found.items():
            print(f"{len(left):4} left | {key}: {result['accuracy']:.1%}", flush=True)
    print("time is up; the same command goes on")


if __name__ == "__main__":
    typer.run(main)
