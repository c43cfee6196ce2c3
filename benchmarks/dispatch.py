"""What a call costs in Python beyond its graph: taking it apart, finding the graph, the result.

python -m benchmarks.dispatch
"""

import statistics
import tempfile
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vera_fx
from benchmarks.cases import narrow_roberta
from vera_fx.graphs.around import finish, prepare


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


SITUATIONS = {"training": (True, True), "evaluating": (True, False), "serving": (False, False)}
"""name: (whether the adapter may train, whether gradients are on)."""


def adapted(layers: int, device: str, *, trainable: bool) -> nn.Module:
    """Layers with an adapter that may train, or with one that was loaded to serve."""
    model = vera_fx.adapt(
        Stack(layers).to(device), vera_fx.VeraConfig(r=2, target_modules="all-linear")
    )
    if trainable:
        return model
    with tempfile.TemporaryDirectory() as folder:
        vera_fx.save_adapter(model, folder)
        return vera_fx.load_adapter(Stack(layers).to(device), folder)


def microseconds(
    situation: str, layers: int, leaves: int, device: str, rounds: int = 2000
) -> float:
    """Median of one call's Python cost around a known graph."""
    trainable, gradients = SITUATIONS[situation]
    model = adapted(layers, device, trainable=trainable)
    args = tuple(torch.randn(4, 8, device=device) for _ in range(leaves))
    samples = []
    with torch.set_grad_enabled(gradients):
        prepared = prepare(model, args, {"flag": True})
        outputs = prepared.graph(*prepared.call.leaves)
        for _ in range(rounds):
            start = time.perf_counter()
            finish(prepare(model, args, {"flag": True}), outputs)
            samples.append(1e6 * (time.perf_counter() - start))
    return statistics.median(samples)


def to_the_graph(layers: int, device: str, rounds: int = 2000) -> float:
    """Median of what a call of RoBERTa's layers costs until its graph is known."""
    model = narrow_roberta(layers, intermediate_size=64).eval().to(device)
    vera_fx.adapt(model, vera_fx.VeraConfig(r=4, target_modules=["query", "value"]))
    ids = torch.randint(3, 90, (2, 6)).to(device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    samples = []
    prepare(model, (), given)
    for _ in range(rounds):
        start = time.perf_counter()
        prepare(model, (), dict(given))
        samples.append(1e6 * (time.perf_counter() - start))
    return statistics.median(samples)


def main(
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
) -> None:
    """Print the cost by number of layers and of tensor arguments."""
    table = Table("layers", "tensor arguments", *SITUATIONS, title="microseconds of a known call")
    for layers in (2, 20, 100):
        for leaves in (1, 12):
            found = (f"{microseconds(name, layers, leaves, device):.0f}" for name in SITUATIONS)
            table.add_row(str(layers), str(leaves), *found)
    Console().print(table)
    Console().print(
        f"12 layers of RoBERTa, until the graph is known: {to_the_graph(12, device):.0f}"
    )


if __name__ == "__main__":
    typer.run(main)
