"""Run the benchmarks: prints a table, writes JSON.

python -m benchmarks                 # training, short list
python -m benchmarks --full          # the whole grid
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case, grid
from benchmarks.devices import name_of
from benchmarks.measure import Timing, gemm_rate, measure
from benchmarks.systems import METHODS
from vera_fx.graphs.machine import multiplies_well

console = Console(width=150)


def overhead(timings: dict[str, Timing], name: str) -> float:
    """A method's overhead over the floor, as a share of compiled PEFT's."""
    floor = timings["floor"].median
    return (timings[name].median - floor) / (timings["peft"].median - floor)


def limit(timings: dict[str, Timing], name: str) -> float:
    """The same share if a step took no longer than its products: the hardware's limit."""
    floor = timings["floor"].limit
    return (timings[name].limit - floor) / (timings["peft"].limit - floor)


def show(case: Case, timings: dict[str, Timing]) -> None:
    """Print one case's table."""
    columns = (
        "",
        "ms (quartiles)",
        "/ floor",
        "/ peft",
        "overhead / peft's (of products alone)",
        "products ms",
        "kept MiB",
        "peak MiB",
        "first step s",
    )
    table = Table(
        *columns,
        title=f"{case.name}: {case.tokens} tokens, {case.layers} layers",
        title_justify="left",
    )
    floor, peft = timings["floor"].median, timings["peft"].median
    for name, t in timings.items():
        table.add_row(
            name,
            f"{t.median:.0f} ({t.low:.0f}-{t.high:.0f})",
            f"{t.median / floor:.2f}",
            f"{t.median / peft:.2f}",
            f"{overhead(timings, name):.2f} ({limit(timings, name):.2f})"
            if name != "floor"
            else "",
            f"{t.limit:.0f}",
            f"{t.kept:.0f}",
            f"{t.peak:.0f}" if t.peak else "",
            f"{t.first:.1f}",
        )
    console.print(table)


def main(
    full: Annotated[bool, typer.Option(help="the whole grid, about an hour")] = False,
    only: Annotated[
        list[str], typer.Option(help="run the cases whose name contains this; may be repeated")
    ] = [],  # noqa: B006
    methods: Annotated[str, typer.Option(help="comma-separated")] = ",".join(METHODS),
    rounds: Annotated[int, typer.Option(min=4)] = 11,
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    output: Annotated[Path, typer.Option()] = Path("out/bench.json"),
) -> None:
    """Time training steps of vera_fx, PEFT and the frozen base, interleaved in one run."""
    rates = {
        str(d).removeprefix("torch."): gemm_rate(d, device) for d in (torch.float32, torch.bfloat16)
    }
    console.print(
        f"torch {torch.__version__}, {name_of(device)}, {torch.get_num_threads()} threads, GFLOP/s: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    )
    results = []
    for case in (replace(case, device=device) for case in grid(full=full)):
        half = case.dtype != torch.float32
        if half and not multiplies_well(case.dtype, torch.device(device)):
            console.print(f"{case.name}: left out, this processor has no instructions for it")
        elif any(part in case.name for part in only or [""]):
            timings = measure(case, methods.split(","), rounds)
            show(case, timings)
            fields = {
                k: str(v) if isinstance(v, torch.dtype) else v for k, v in asdict(case).items()
            }
            others = [name for name in timings if name != "floor"]
            shares = {n: [overhead(timings, n), limit(timings, n)] for n in others}
            results.append(
                {
                    "case": fields,
                    "timings": {n: asdict(t) for n, t in timings.items()},
                    "overhead": shares,
                }
            )
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps({"gflops": rates, "results": results}, indent=2) + "\n")
    console.print(f"written to {output}")


if __name__ == "__main__":
    typer.run(main)
