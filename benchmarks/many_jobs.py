"""Many adapters trained in one batch, against the same jobs one after the other: ours, PEFT's VeRA and LoRA.

python -m benchmarks.many_jobs
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import typer
from rich.table import Table
from torch import Tensor, nn

import vera_fx
from benchmarks.many_work import Work
from benchmarks.measure import interleaved
from benchmarks.report import console, write
from vera_fx.training.examples import padding_for
from vera_fx.training.forward import Forward
from vera_fx.training.many import ManyJobs

SYSTEMS = ("one batch", "one adapter", "ours in turn", "PEFT VeRA in turn", "PEFT LoRA in turn")
FACTORED = "one adapter, factored"
"""By the plan that mixtures have: what is left of a difference is mixing."""
MEMORY = ("one batch", "one adapter", "ours in turn")
RANK, RATE = 256, 1e-2


def one_batch(work: Work, compiled: bool, device: str, tokens: int | None) -> Callable[[], None]:
    """A step of all jobs in one batch, optimiser included."""
    model = work.base(device)
    call = torch.compile(model) if compiled else model
    many = ManyJobs(Forward(model, call, padding_for(0), most=tokens))
    settings = vera_fx.TrainSettings(
        steps=10**6, batch_size=work.rows // work.jobs, shuffle=False, lr=RATE
    )
    config = vera_fx.VeraConfig(r=RANK, target_modules=work.targets)
    for number, rows in enumerate(work.examples()):
        many.add(f"job{number}", config, rows, settings)
    model.train()
    return many.step


def in_turn(
    model: nn.Module, batches: list[dict[str, Tensor]], compiled: bool, rate: float = RATE
) -> Callable[[], None]:
    """The same jobs one after the other: as many small steps of a model with one adapter."""
    call = torch.compile(model.train()) if compiled else model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)

    def step() -> None:
        for batch in batches:
            call(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def adapted(system: str, work: Work, device: str) -> nn.Module:
    """The base with one adapter of a system that trains jobs one after the other."""
    base, targets = work.base(device), work.targets
    if system == "PEFT LoRA in turn":
        return peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=targets))
    if system == "PEFT VeRA in turn":
        config: Any = peft.VeraConfig(r=RANK, target_modules=targets, save_projection=False)
        return peft.get_peft_model(base, config)
    plan = "factored" if system == FACTORED else "auto"
    return vera_fx.adapt(base, vera_fx.VeraConfig(r=RANK, target_modules=targets, plan=plan))


def make(
    system: str, work: Work, compiled: bool = False, device: str = "cpu", tokens: int | None = None
) -> Callable[[], None]:
    """One round of one system: a step of every job."""
    if system == "one batch":
        return one_batch(work, compiled, device, tokens)
    batches = work.batches(device, together=system in {"one adapter", FACTORED})
    return in_turn(adapted(system, work, device), batches, compiled)


def peak(system: str, work: Work, tokens: int | None = None) -> float:
    """MiB that a process of its own holds at most from the second round on, its imports left out."""
    code = (
        "from benchmarks.many_jobs import *; from benchmarks.report import resident; "
        f"work = {work!r}; work.examples(); before = resident(); "
        f"step = make({system!r}, work, tokens={tokens!r}); step(); step(); "
        "Path('/proc/self/clear_refs').write_text('5'); step(); print((resident(peak=True) - before) / 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measured(
    work: Work,
    rounds: int,
    systems: list[str],
    *,
    compiled: bool,
    device: str,
    tokens: int | None,
    processor: bool,
) -> dict[str, Any]:
    """Milliseconds of a round of each system, in turns."""
    torch._dynamo.reset()
    runs = {name: make(name, work, compiled, device, tokens) for name in systems}
    clock = time.process_time if processor else time.perf_counter
    spreads = interleaved(runs, rounds, inner=1, device=device, clock=clock)
    return {name: vars(spread) for name, spread in spreads.items()}


def main(  # noqa: PLR0913, PLR0917
    jobs: Annotated[list[int], typer.Option(help="how many at once")] = [1, 4, 16, 64],  # noqa: B006
    shapes: Annotated[list[str], typer.Option(help="minilm, llama")] = ["minilm", "llama"],  # noqa: B006
    systems: Annotated[list[str], typer.Option(help=f"beside {SYSTEMS[0]!r}")] = list(SYSTEMS[1:]),  # noqa: B006
    rows: Annotated[int, typer.Option(help="of all jobs together")] = 64,
    length: Annotated[int, typer.Option(help="tokens of a row")] = 16,
    rounds: Annotated[int, typer.Option(min=4)] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--eager")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory")] = True,
    data: Annotated[
        str, typer.Option(help="random, or sentiment: four domains, MiniLM")
    ] = "random",
    tokens: Annotated[int | None, typer.Option(help="of a pass of the one batch")] = None,
    processor: Annotated[
        bool, typer.Option("--processor/--wall", help="time of the processor: for busy machines")
    ] = False,
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    output: Annotated[Path, typer.Option()] = Path("out/bench_many_jobs.json"),
) -> None:
    """Steps with AdamW: 1 to 64 jobs at equal total rows; times as ratios to all of them in one batch."""
    if data not in {"random", "sentiment"}:
        raise typer.BadParameter(f"--data must be random or sentiment, got {data!r}")
    how = {"compiled": compiled, "device": device, "processor": processor}
    shapes = ["minilm"] if data == "sentiment" else shapes
    found: list[dict[str, Any]] = []
    table = Table(
        "shape", "jobs", "ms, one batch", *systems, "MiB", title=f"{rows} rows, {data} data"
    )
    for shape in shapes:
        for count in jobs:
            work, names = Work(shape, count, rows, length, data), [SYSTEMS[0], *systems]
            spreads = measured(work, rounds, names, tokens=tokens, **how)
            mine = spreads[SYSTEMS[0]]
            names = MEMORY if memory and device == "cpu" else ()
            most = {name: peak(name, work, tokens) for name in names}
            times = [f"{spreads[name]['median'] / mine['median']:.2f}" for name in systems]
            spread = f"{mine['median']:.0f} ({mine['low']:.0f}-{mine['high']:.0f})"
            row = (shape, str(count), spread, *times, ", ".join(f"{v:.0f}" for v in most.values()))
            table.add_row(*row)
            console.print(*row, highlight=False)
            found.append({"shape": shape, "jobs": count, "ms": spreads, "mib": most})
    console.print(table)
    console.print(f"MiB at most: {', '.join(MEMORY)}. One adapter: a step of one on as many rows.")
    settings = {"rows": rows, "length": length, "data": data, "tokens": tokens, **how}
    write(output, {**settings, "results": found})


if __name__ == "__main__":
    typer.run(main)
