"""What a call costs in Python beyond its graph: taking it apart, finding the graph, the result.

python -m benchmarks.dispatch
"""

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vera_fx
from vera_fx.runtime import finish, prepare


class Stack(nn.Module):
    """Some linear layers and a dozen tensor arguments."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: Tensor, *others: Tensor, flag: bool = True) -> dict[str, Tensor]:
        """Run the layers; the others are added up."""
        for layer in self.layers:
            x = layer(x)
        return {"y": x + sum(others), "x": x} if flag else {"y": x, "x": x}


def microseconds(layers: int, leaves: int, rounds: int = 2000) -> float:
    """Median of one call's Python cost around a known graph."""
    model = vera_fx.adapt(Stack(layers), vera_fx.VeraConfig(r=2, target_modules="all-linear"))
    args = tuple(torch.randn(4, 8) for _ in range(leaves))
    samples = []
    with torch.no_grad():
        prepared = prepare(model, args, {"flag": True})
        outputs = prepared.graph(*prepared.call.leaves)
        for _ in range(rounds):
            start = time.perf_counter()
            finish(prepare(model, args, {"flag": True}), outputs)
            samples.append(1e6 * (time.perf_counter() - start))
    return statistics.median(samples)


def main() -> None:
    """Print the cost by number of layers and of tensor arguments."""
    table = Table("layers", "tensor arguments", "microseconds", title="dispatch of a known call")
    for layers in (2, 20, 100):
        for leaves in (1, 12):
            table.add_row(str(layers), str(leaves), f"{microseconds(layers, leaves):.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
