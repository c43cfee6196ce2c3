"""What a process keeps of every capture that it made, beside torch.export in a loop.

python -m benchmarks.growth            # this library: 20 captures kept, whatever the number made
python -m benchmarks.growth --export   # torch.export alone, nothing kept
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.fx.graph_module import _loader

import vera_fx
from benchmarks.report import console, resident, write
from vera_fx.graphs.runtime import runtime_of

KEPT, X = 20, torch.linspace(0, 1, 24).reshape(3, 8)


class Net(nn.Module):
    """A number in it is baked into every capture."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 7)
        self.gain = 0

    def forward(self, x: Tensor) -> Tensor:
        """One open size, eight columns."""
        return self.down(self.up(x).relu()) + self.gain


def captures(model: Any) -> Callable[[], None]:
    """Makes a capture of the adapted model."""
    config = vera_fx.VeraConfig(r=3, target_modules=["up", "down"])
    vera_fx.adapt(model.eval(), config)
    runtime_of(model).kept.graphs = KEPT
    return lambda: model(X)


def exports(model: Any) -> Callable[[], None]:
    """Makes a program of the plain model."""
    sizes = ({0: torch.export.Dim.AUTO},)
    return lambda: torch.export.export(model.eval(), (X,), dynamic_shapes=sizes, strict=False)


def now() -> dict[str, float]:
    """Python objects, MiB after free memory went back to the system, and graphs' code that torch keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    objects = len(gc.get_objects())
    return {"objects": objects, "MiB": resident() / 2**20, "printed": len(_loader.eval_cache)}


def main(
    export: Annotated[bool, typer.Option("--export/--ours")] = False,
    count: Annotated[int, typer.Option(help="captures of a round; four follow the first")] = 60,
    output: Annotated[Path, typer.Option()] = Path("out/bench_growth.json"),
) -> None:
    """Make captures, each for another number in the model, and count what is left after each round."""
    model = Net()
    make, found = exports(model) if export else captures(model), list[dict[str, float]]()
    for number in range(5):
        for _ in range(count):
            model.gain += 1
            make()
        found.append(now())
        if number:
            each = {key: (value - found[-2][key]) / count for key, value in found[-1].items()}
            words = ", ".join(f"{value:.3f} {key}" for key, value in each.items())
            console.print(f"each of {count} more leaves: {words}", highlight=False)
    write(output, {"export": export, "count": count, "rounds": found})


if __name__ == "__main__":
    typer.run(main)
