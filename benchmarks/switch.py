"""What a switch costs, by the model's layers and the number of adapters; PEFT's beside it.

python -m benchmarks.switch
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peft
import typer
from rich.table import Table
from torch import nn

import vera_fx
from benchmarks.cases import narrow_roberta
from benchmarks.devices import wait
from benchmarks.report import console, write

TARGETS = ["query", "value"]
SIZES = [(2, 2), (12, 2), (12, 50), (96, 2)]
"""(layers, adapters) that are measured."""


def roberta(layers: int, device: str) -> nn.Module:
    """A narrow RoBERTa: a switch does not look at how wide a layer is."""
    return narrow_roberta(layers, intermediate_size=64).eval().to(device)


def ours(base: nn.Module, adapters: int, *, trainable: bool) -> Callable[[str], None]:
    """`vera_fx.set_adapter`, between adapters that may train or were made for serving."""
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=8, target_modules=TARGETS), adapter_name="a0")
    for number in range(1, adapters):
        vera_fx.add_adapter(model, f"a{number}")
    for adapter in model.vera.adapters.values():  # as load_adapter(trainable=...) makes them
        adapter.trainable = trainable
        adapter.requires_grad_(False)
    return lambda name: vera_fx.set_adapter(model, name)


def theirs(base: nn.Module, adapters: int) -> Callable[[str], None]:
    """PEFT's ``set_adapter`` for VeRA."""
    config = peft.VeraConfig(r=8, target_modules=TARGETS, save_projection=False)
    model = peft.get_peft_model(base, config, adapter_name="a0")
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", config)
    return model.set_adapter


def microseconds(switch: Callable[[str], None], rounds: int, device: str) -> float:
    """Median over switches back and forth, until the device is done with them."""
    samples: list[float] = []
    for number in range(rounds + 10):
        wait(device)
        start = time.perf_counter()
        switch(f"a{number % 2}")
        wait(device)
        samples.append(1e6 * (time.perf_counter() - start))
    return statistics.median(samples[10:])


def main(
    rounds: Annotated[int, typer.Option(min=10)] = 300,
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    output: Annotated[Path, typer.Option()] = Path("out/bench_switch.json"),
) -> None:
    """Time switches between two of the adapters."""
    columns = ("serving", "may train", "PEFT")
    table = Table("layers", "adapters", *columns, title="microseconds a switch")
    figures: list[dict[str, Any]] = []
    for layers, adapters in SIZES:
        base = roberta(layers, device)
        switches = {
            "serving": ours(copy.deepcopy(base), adapters, trainable=False),
            "may train": ours(copy.deepcopy(base), adapters, trainable=True),
            "PEFT": theirs(base, adapters),
        }
        found = {name: microseconds(switch, rounds, device) for name, switch in switches.items()}
        figures.append({"layers": layers, "adapters": adapters, "microseconds": found})
        table.add_row(str(layers), str(adapters), *(f"{found[name]:.0f}" for name in columns))
    console.print(table)
    write(output, {"switch": figures})


if __name__ == "__main__":
    typer.run(main)
