"""A sweep of sixteen learning rates from the loaded base to the last step: in one batch, and one after the other.

OMP_NUM_THREADS=1 python -m benchmarks.many_sweep --processor
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import vera_fx
from benchmarks.many_jobs import RANK, SYSTEMS, adapted, in_turn
from benchmarks.many_work import Work
from benchmarks.report import console, write

RATES = tuple(1e-3 * 1.4**at for at in range(16))


def at_once(work: Work, steps: int) -> None:
    """All rates by `train_many`, what it captures and lays out included."""
    config = vera_fx.VeraConfig(r=RANK, target_modules=work.targets)
    jobs: Any = {}
    for at, (rate, rows) in enumerate(zip(RATES, work.examples(), strict=True)):
        settings = vera_fx.TrainSettings(
            steps=steps, batch_size=len(rows), shuffle=False, lr=rate, schedule="constant"
        )
        jobs[f"rate{at}"] = (config, rows, settings)
    vera_fx.train_many(work.base(), jobs, progress=False)


def one_by_one(system: str, work: Work, steps: int) -> None:
    """Each rate on a base of its own, as a loop over rates is written."""
    for rate, batch in zip(RATES, work.batches(), strict=True):
        step = in_turn(adapted(system, work, "cpu"), [batch], compiled=False, rate=rate)
        for _ in range(steps):
            step()


def main(
    rows: Annotated[list[int], typer.Option(help="of a step of one job")] = [1, 4],  # noqa: B006
    steps: Annotated[int, typer.Option(help="of each job")] = 30,
    processor: Annotated[bool, typer.Option("--processor/--wall")] = False,
    output: Annotated[Path, typer.Option()] = Path("out/bench_many_sweep.json"),
) -> None:
    """Seconds of a sweep over sixteen rates, on sentences of the four domains over MiniLM."""
    clock = time.process_time if processor else time.perf_counter
    found: list[dict[str, Any]] = []
    for each in rows:
        work = Work("minilm", len(RATES), len(RATES) * each, 0, "sentiment")
        work.base()
        work.examples()  # the data is read before the clock runs
        seconds: dict[str, float] = {}
        for system in ("one batch", *SYSTEMS[2:]):
            torch.manual_seed(0)
            start = clock()
            if system == "one batch":
                at_once(work, steps)
            else:
                one_by_one(system, work, steps)
            seconds[system] = clock() - start
            console.print(f"{each} rows, {system}: {seconds[system]:.1f} s", highlight=False)
        found.append({"rows": each, "steps": steps, "seconds": seconds})
    write(output, {"processor": processor, "results": found})


if __name__ == "__main__":
    typer.run(main)
