"""Inference: the adapted model, merged and unmerged, against the plain base, interleaved.

python -m benchmarks.inference
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import vera_fx
from benchmarks.cases import Case, build, inputs
from benchmarks.measure import Spread, interleaved
from benchmarks.systems import ours, peft_vera

console = Console(width=120)

CASES = {
    "prefill, 16 x 128 tokens": ("q_proj", "v_proj", 256, 16, 128),
    "one token, batch 1": ("q_proj", "v_proj", 256, 1, 1),
    "one token, batch 16": ("q_proj", "v_proj", 256, 16, 1),
}


def methods(case: Case) -> dict[str, nn.Module]:
    """The models that are compared, all with the same vectors, all in eval mode."""
    base = build(case).eval().requires_grad_(requires_grad=False)
    adapted = ours(base, case)
    merged = copy.deepcopy(adapted)
    vera_fx.merge(merged)
    return {
        "base": copy.deepcopy(base),
        "merged": merged,
        "unmerged": adapted,
        "peft": peft_vera(base, case),
    }


def runs(case: Case, *, compiled: bool) -> dict[str, Callable[[], Any]]:
    """One call of each method as a function."""
    arguments = {k: v.detach() for k, v in inputs(case).items()}

    def call(model: Any) -> Callable[[], Any]:
        return lambda: model(**arguments)

    found = methods(case)
    return {name: call(torch.compile(m) if compiled else m) for name, m in found.items()}


def row(name: str, spreads: dict[str, Spread]) -> list[str]:
    """One line of the table: milliseconds of the base, ratios of the others to it."""
    base = spreads["base"].median
    return [
        name,
        f"{base:.2f} ({spreads['base'].low:.2f}-{spreads['base'].high:.2f})",
        *(f"{spreads[n].median / base:.2f}" for n in ("merged", "unmerged", "peft")),
    ]


def main(
    rounds: Annotated[int, typer.Option(min=4)] = 15,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    output: Annotated[Path, typer.Option()] = Path("out/bench_inference.json"),
) -> None:
    """Time calls without gradients of a Llama shape, query and value adapted at rank 256."""
    table = Table("llama q,v r=256", "base ms (quartiles)", "merged", "unmerged", "peft")
    results = {}
    for name, (first, second, r, batch, length) in CASES.items():
        for compiled in (False, True):
            case = Case(name, "llama", (first, second), r, layers, batch, length, device=device)
            torch._dynamo.reset()
            with torch.no_grad():
                spreads = interleaved(runs(case, compiled=compiled), rounds, device=device)
            label = f"{name}, {'compiled' if compiled else 'eager'}"
            results[label] = {k: vars(v) for k, v in spreads.items()}
            table.add_row(*row(label, spreads))
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"written to {output}")


if __name__ == "__main__":
    typer.run(main)
