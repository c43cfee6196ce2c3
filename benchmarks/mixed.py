"""Batches that mix adapters against batches of one adapter, PEFT's loop and PEFT LoRA's mixture.

python -m benchmarks.mixed
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import typer
from rich.console import Console
from rich.table import Table

import vera_fx
from benchmarks.cases import QV, Case, build, inputs
from benchmarks.measure import interleaved
from benchmarks.systems import ours, peft_lora, peft_vera, randomised

console = Console(width=120)
ROWS = 64


def names_of(distinct: int) -> list[str]:
    """One name per row, so many different ones in turns."""
    return [f"a{row % distinct}" for row in range(ROWS)]


def our_runs(
    case: Case, arguments: dict[str, Any], *, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """One adapter for all rows by `set_adapter`, and mixtures."""
    model = ours(build(case).eval(), case, "factored")
    for number in range(ROWS):
        vera_fx.add_adapter(model, f"a{number}")
    vera_fx.set_adapter(randomised(model), "a0")
    call = torch.compile(model) if compiled else model
    found: dict[str, Callable[[], Any]] = {"uniform": lambda: call(**arguments)}
    for distinct in (1, 4, 64):
        names = names_of(distinct)
        found[f"mixed {distinct}"] = lambda names=names: call(**arguments, adapter_names=names)
    return found


def peft_runs(case: Case, arguments: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """PEFT's VeRA adapter by adapter, and PEFT LoRA's own ``adapter_names``."""
    vera, lora = (
        peft_vera(build(case).eval(), case).eval(),
        peft_lora(build(case).eval(), case).eval(),
    )
    for number in range(ROWS):
        for model in (vera, lora):
            model.add_adapter(f"a{number}", model.peft_config["default"])
    randomised(vera)

    def loop(distinct: int) -> None:
        for number in range(distinct):
            rows = slice(number, None, distinct)
            vera.set_adapter(f"a{number}")
            vera(**{key: value[rows] for key, value in arguments.items()})

    found: dict[str, Callable[[], Any]] = {}
    for distinct in (4, 64):
        names = names_of(distinct)
        found[f"peft vera loop {distinct}"] = lambda d=distinct: loop(d)
        found[f"peft lora {distinct}"] = lambda names=names: lora(**arguments, adapter_names=names)
    return found


def main(
    rounds: Annotated[int, typer.Option(min=4)] = 8,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    output: Annotated[Path, typer.Option()] = Path("out/bench_mixed.json"),
) -> None:
    """Time RoBERTa's shape, 64 rows of 16 tokens, query and value at rank 256, 65 adapters loaded."""
    case = Case("mixed", "roberta", QV["roberta"], 256, layers, ROWS, 16, device=device)
    arguments = {key: value.detach() for key, value in inputs(case).items()}
    compiled = our_runs(case, arguments, compiled=True)
    runs = {
        **our_runs(case, arguments, compiled=False),
        **{f"{name}, compiled": run for name, run in compiled.items()},
        **peft_runs(case, arguments),
    }
    with torch.no_grad():
        spreads = interleaved(runs, rounds, device=device)
    table = Table("64 rows x 16 tokens", "ms (quartiles)", "to uniform", "rows/s")
    for name, spread in spreads.items():
        own = spreads["uniform, compiled" if "compiled" in name else "uniform"].median
        text = f"{spread.median:.1f} ({spread.low:.1f}-{spread.high:.1f})"
        table.add_row(name, text, f"{spread.median / own:.2f}", f"{1e3 * ROWS / spread.median:.0f}")
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({k: vars(v) for k, v in spreads.items()}, indent=2) + "\n")
    console.print(f"written to {output}; peft {peft.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    typer.run(main)
