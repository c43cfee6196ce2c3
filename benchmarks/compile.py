"""Time of the first compiled training step, in a process that starts cold and in one that starts warm.

python -m benchmarks.compile
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.cases import QV, Case, build, inputs
from benchmarks.devices import wait
from benchmarks.processes import answer, apart
from benchmarks.report import console, write
from benchmarks.systems import make

NAMES = ("floor", "peft", "lora r=8", "ours")
CASES = (
    Case("roberta q,v r=1024", "roberta", QV["roberta"], 1024, 2, 2, 128),
    Case("llama all r=256", "llama", "all-linear", 256, 2, 2, 128),
)


def first_step(name: str, case: Case) -> float:
    """Seconds of the first step: capture, passes and compilation included."""
    system, arguments = make(name, build(case), case), inputs(case)
    start = time.perf_counter()
    system.step(arguments)
    wait(case.device)
    return time.perf_counter() - start


def in_process(name: str, case: Case, cache: str) -> float:
    """`first_step` in a process of its own, whose compiled code is kept in ``cache``."""
    # torch leaves graphs with autograd functions, as ours are, out of its outer cache otherwise.
    allowed = {"TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1"}
    return apart("benchmarks.compile", name, case, TORCHINDUCTOR_CACHE_DIR=cache, **allowed)


def main(
    layers: Annotated[list[int], typer.Option()] = [2, 12],  # noqa: B006
    only: Annotated[str, typer.Option(help="run the cases whose name contains this")] = "",
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    output: Annotated[Path, typer.Option()] = Path("out/bench_compile.json"),
) -> None:
    """Time first steps of every method, one after the other, nothing else running."""
    columns = ("case", "layers", *(f"{n}: cold, warm" for n in NAMES), "cold / peft", "warm / peft")
    table, results = Table(*columns, title="seconds of the first step"), []
    for case in CASES:
        for count in layers if only in case.name else ():
            found: dict[str, tuple[float, float]] = {}
            for name in NAMES:
                with tempfile.TemporaryDirectory() as cache:
                    sized = replace(case, layers=count, device=device)
                    found[name] = in_process(name, sized, cache), in_process(name, sized, cache)
            ratios = [ours / peft for ours, peft in zip(found["ours"], found["peft"], strict=True)]
            cells = [f"{cold:.1f}, {warm:.1f}" for cold, warm in found.values()]
            table.add_row(case.name, str(count), *cells, *(f"{ratio:.2f}" for ratio in ratios))
            results.append({"case": case.name, "layers": count, "seconds": found})
    console.print(table)
    write(output, {"results": results})


if __name__ == "__main__" and not answer(first_step):
    typer.run(main)
