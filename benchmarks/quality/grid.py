"""Which runs there are, in the order in which they are done: rates first, on sentences that judge nothing."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality import training
from benchmarks.quality.methods import ABLATIONS, IMAGES, PEFT, SIZES, TEXT, method, methods_of
from benchmarks.quality.results import Result, chosen
from benchmarks.quality.tasks import DOMAINS, task
from benchmarks.quality.training import Run

SEEDS = (0, 1, 2, 3, 4)
SWEPT, SWEEP_SEEDS = "movies", {"movies": (100,), "digits": (100,)}
"""The domain whose validation sentences choose every domain's rates, and the seeds of these runs."""

MANY, MANY_RATES = "VeRA r=256", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""The method whose rates are swept by `train_many`, and they."""

ALONE = (3e-2,)
"""Rates at which it is trained alone as well, for comparison."""

DEEP = "movies"
"""The domain of sizes, ablations and PEFT's VeRA."""

Results = dict[str, Result]


@dataclass(frozen=True)
class Job:
    """Runs that are done together.

    Attributes:
        keys: of the lines that it adds.
        work: what computes them.
    """

    keys: tuple[str, ...]
    work: Callable[[], Results]


def jobs(results: Mapping[str, Result]) -> Iterator[Job]:
    """Every job that can be done now: those of later stages wait for the rates of the first."""
    yield from map(commoner, (*DOMAINS, "digits"))
    sweep = [*_sweep(SWEPT), *_sweep("digits")]
    yield from sweep
    if any(key not in results for job in sweep for key in job.keys):
        return
    yield from map(single, _tables(chosen(results)))


def single(run: Run) -> Job:
    """One run by itself."""
    return Job((run.key,), lambda: training.perform(run))


def together(first: Run, rates: tuple[float, ...]) -> Job:
    """A method's rates in one batch."""
    runs = (Run(first.stage, first.task, first.method, lr, first.seed, first.part) for lr in rates)
    return Job(tuple(run.key for run in runs), lambda: training.many(first, rates))


def commoner(name: str) -> Job:
    """What it gives to choose the test's commoner label, whatever the example: no training."""
    run = Run("labels", name, "commoner label", 0.0, 0)

    def work() -> Results:
        labels = Counter(row["labels"] for row in task(name).test)
        share = max(labels.values()) / labels.total()
        return {run.key: {**training.facts(run), "accuracy": share, "examples": labels.total()}}

    return Job((run.key,), work)


def _sweep(place: str) -> Iterator[Job]:
    for seed in SWEEP_SEEDS[place]:
        ways = {**methods_of(place), **(SIZES if place == SWEPT else {})}
        for name, way in ways.items():
            first = Run("sweep", place, name, 0.0, seed, "validation")
            if place == SWEPT and name == MANY:
                yield together(first, MANY_RATES)
            else:
                yield from (single(_with(first, lr=lr)) for lr in way.rates)
        if place == SWEPT:
            yield from (single(Run("alone", place, MANY, lr, seed, "validation")) for lr in ALONE)


def _with(run: Run, **fields: Any) -> Run:
    return Run(**{**training.facts(run), **fields})


def _tables(rates: Mapping[tuple[bool, str], float]) -> Iterator[Run]:
    """What matters most comes first: whoever stops early has whole tables."""

    def over(stage: str, tasks: Sequence[str], names: Iterable[str]) -> Iterator[Run]:
        names = list(names)
        for seed, place, name in itertools.product(SEEDS, tasks, names):
            found = method(place, name).like or name
            yield Run(stage, place, name, rates[place == "digits", found], seed)

    first = ("head", "VeRA r=256", "LoRA r=8")
    small = ("LoRA r=1",)
    cheap = ("d_initial = 1", "only b trains", "only d trains, from 0, b = 1")
    yield from over("text", DOMAINS, first)
    yield from over("peft", (DEEP,), PEFT)
    yield from over("text", (DEEP,), ("DVoRA r=256", "full"))
    yield from over("images", ("digits",), IMAGES)
    yield from over("sizes", (DEEP,), small)
    yield from over("ablation", (DEEP,), cheap)
    yield from over("sizes", (DEEP,), (name for name in SIZES if name not in small))
    others = [name for name in DOMAINS if name != DEEP]
    yield from over("text", others, ("full",))
    yield from over("ablation", (DEEP,), (name for name in ABLATIONS if name not in cheap))
    yield from over("text", others, (name for name in TEXT if name not in {*first, "full"}))
    yield from over("sizes", others, ("VeRA r=256, all linear",))
