"""Draws docs/quality.svg, accuracy against trained parameters: python -m benchmarks.quality.chart.

Needs matplotlib (the extra ``chart``). The points are in the file as text as well, for the test that compares
them with the runs.
"""

import itertools
import json
from pathlib import Path

from benchmarks.quality.results import FILE, read
from benchmarks.quality.tables import DEEP, Runs, methods_in, middle, plain

PICTURE = FILE.with_suffix(".svg")
COLOURS = {
    "VeRA": "#1f6feb",
    "DVoRA": "#8250df",
    "LoRA": "#c9a227",
    "full": "#57606a",
    "head": "#8a8f98",
}
MARKS = "oDsv^P*X<>"

Point = tuple[str, int, float, float, float]


def points(runs: Runs) -> list[Point]:
    """``(method, trained, median, lowest, highest)`` of every method on `DEEP`."""
    found: list[Point] = []
    for name in methods_in(runs, "text", "sizes"):
        mine = plain(runs, name, DEEP)
        if mine:
            values = [r["accuracy"] for r in mine]
            found.append((name, mine[0]["trained"], middle(mine), min(values), max(values)))
    return found


def draw(found: list[Point], target: Path) -> None:
    """A point for each method, its range over seeds as a bar."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vera_fx"  # the same numbers give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for (name, trained, value, low, high), mark in zip(found, itertools.cycle(MARKS)):
        colour = COLOURS[name.partition(" ")[0]]
        bars = [[100 * (value - low)], [100 * (high - value)]]
        axes.errorbar(trained, 100 * value, bars, fmt=mark, color=colour, capsize=3, label=name)
    axes.legend(loc="lower right", frameon=False)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters, head included")
    axes.set_ylabel(f"accuracy on {DEEP}, %: median and range of the seeds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None, "Description": json.dumps(found)})


if __name__ == "__main__":
    draw(points(read()), PICTURE)
