"""Quantised bases: training steps, calls and one-token decode, against PEFT's VeRA and LoRA on the same base.

python -m benchmarks.quantised
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

from benchmarks.cases import BF16, Case, build, inputs
from benchmarks.measure import Spread, Timing, interleaved, measure
from benchmarks.report import console, write
from benchmarks.systems import METHODS, make

NAMES = tuple(METHODS)
KINDS = ("nf4", "int8")


def cases(layers: int, kinds: Sequence[str]) -> list[Case]:
    """Llama's architecture at hidden size 768, all linear layers, bfloat16 beside quantised weights."""
    return [
        Case(f"llama all r=256 {kind} T={batch * 128}", "llama", "all-linear", 256, layers, batch, 128,
             BF16, quantised=kind)
        for kind in kinds
        for batch in (4,)
    ]  # fmt: skip


def calls(case: Case, rounds: int) -> dict[str, dict[str, Spread]]:
    """Calls without gradients: a whole batch, and one token, eager and compiled."""
    base = build(case).eval()
    whole = {k: v.detach() for k, v in inputs(case).items()}
    token = {"inputs_embeds": whole["inputs_embeds"][:1, :1].clone()}
    systems = {name: make(name, base, case).model for name in NAMES}

    def call(model: nn.Module, given: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(**given)

    return {
        what: interleaved(
            {name: lambda m=m, g=given: call(m, g) for name, m in systems.items()}, rounds
        )
        for what, given in (("call", whole), ("token", token))
    }


def memory(case: Case) -> dict[str, float]:
    """MiB of what is kept all the time: the base quantised and in its dtype, vectors, projections."""
    plain = copy.deepcopy(case.__dict__) | {"quantised": ""}
    model = make("ours eager", build(case), case).model
    held = dict([*model.named_parameters(), *model.named_buffers()])
    own = {name: t for name, t in held.items() if name.startswith("vera.")}
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors) / 2**20  # noqa: E731
    return {
        "base": size(t for name, t in held.items() if name not in own),
        "base, not quantised": size(build(Case(**plain)).parameters()),
        "vectors": size(t for name, t in own.items() if "lambda" in name),
        "projections": size(t for name, t in own.items() if "lambda" not in name),
    }


def show(
    case: Case,
    timings: dict[str, Timing],
    found: dict[str, dict[str, Spread]],
    held: dict[str, float],
) -> None:
    """Print one case."""
    columns = (
        "",
        "step ms",
        "/ peft",
        "call / peft",
        "token / peft",
        "kept MiB",
        "excess / peft's",
    )
    table = Table(*columns, title=f"{case.name}, {case.layers} layers", title_justify="left")
    floor = timings["floor"].kept
    for name, t in timings.items():
        peer = "peft eager" if name.endswith("eager") else "peft"
        shares = [found[w][name].median / found[w][peer].median for w in ("call", "token")]
        excess = (t.kept - floor) / (timings[peer].kept - floor)
        table.add_row(
            name,
            f"{t.median:.0f} ({t.low:.0f}-{t.high:.0f})",
            f"{t.median / timings[peer].median:.2f}",
            *(f"{share:.2f}" for share in shares),
            f"{t.kept:.0f}",
            f"{excess:.2f}",
        )
    console.print(table)
    console.print("  MiB: " + ", ".join(f"{name} {value:.1f}" for name, value in held.items()))


def main(
    layers: int = 4,
    kinds: Annotated[list[str], typer.Option(help="nf4, int8; may be repeated")] = list(KINDS),  # noqa: B006
    rounds: Annotated[int, typer.Option(min=4)] = 7,
    output: Path = Path("out/quantised.json"),
) -> None:
    """Measure and print."""
    figures: dict[str, Any] = {}
    for case in cases(layers, kinds):
        timings, found, held = measure(case, NAMES, rounds), calls(case, rounds), memory(case)
        show(case, timings, found, held)
        figures[case.name] = {
            "training": {name: asdict(t) for name, t in timings.items()},
            **{w: {name: asdict(s) for name, s in of.items()} for w, of in found.items()},
            "memory": held,
        }
    write(output, figures)


if __name__ == "__main__":
    typer.run(main)
