"""Which runs there are, in the order in which they are done: rates first, on sentences that judge nothing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quality import training
from benchmarks.quality.methods import ABLATIONS, PEFT, SIZES, method, methods_of
from benchmarks.quality.results import Result, chosen
from benchmarks.quality.tasks import DOMAINS
from benchmarks.quality.training import Run

SEEDS = (0, 1, 2, 3, 4)
SWEPT, SWEEP_SEED = ("movies",), 100
"""The domain whose validation sentences choose every domain's rates, and the seed of these runs."""

MANY, MANY_RATES = "VeRA r=256", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""The method whose rates are swept by `train_many`, and they."""

ALONE = (1e-2, 3e-2)
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
    sweep = list(_sweep(("digits",))) + list(_sweep(SWEPT))
    yield from sweep
    if any(key not in results for job in sweep for key in job.keys):
        return
    rates = chosen(results)
    runs = [*_first_tables(rates), *_deep("peft", PEFT, rates), *_deep("sizes", SIZES, rates)]
    yield from map(single, [*runs, *_deep("ablation", ABLATIONS, rates)])


def single(run: Run) -> Job:
    """One run by itself."""
    return Job((run.key,), lambda: training.perform(run))


def together(first: Run, rates: tuple[float, ...]) -> Job:
    """A method's rates in one batch."""
    runs = (Run(first.stage, first.task, first.method, lr, first.seed, first.part) for lr in rates)
    return Job(tuple(run.key for run in runs), lambda: training.many(first, rates))


def _sweep(tasks: tuple[str, ...]) -> Iterator[Job]:
    for task in tasks:
        for name, way in methods_of(task).items():
            first = Run("sweep", task, name, 0.0, SWEEP_SEED, "validation")
            if name == MANY and task != "digits":
                yield together(first, MANY_RATES)
                continue
            for lr in way.rates:
                yield single(_with(first, lr=lr))
    if "digits" not in tasks:
        for lr in ALONE:
            yield single(Run("alone", tasks[0], MANY, lr, SWEEP_SEED, "validation"))


def _with(run: Run, **fields: Any) -> Run:
    return Run(**{**training.facts(run), **fields})


def _first_tables(rates: Mapping[tuple[bool, str], float]) -> Iterator[Run]:
    for task in ("digits",):
        for seed in SEEDS:
            for name in methods_of(task):
                yield Run("images", task, name, rates[True, name], seed)
    for seed in SEEDS:
        for task in DOMAINS:
            for name in methods_of(task):
                yield Run("text", task, name, rates[False, name], seed)


def _deep(
    stage: str, ways: Mapping[str, Any], rates: Mapping[tuple[bool, str], float]
) -> Iterator[Run]:
    for seed in SEEDS:
        for name in ways:
            yield Run(stage, DEEP, name, rates[False, method(DEEP, name).like], seed)
