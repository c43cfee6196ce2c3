"""What a training step costs the host: tiny layers, whose arithmetic takes no time on any device.

python -m benchmarks.host                  # 6, 12, 24, 48 layers
python -m benchmarks.host --first          # the first step as well, cold and warm (minutes)
python -m benchmarks.host_parts            # layers that run graphs of their own, under FSDP2
"""

import copy
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

import vera_fx
from benchmarks.cases import Case, narrow_roberta
from benchmarks.devices import wait
from benchmarks.processes import answer, apart
from benchmarks.report import console, write
from benchmarks.systems import System, floor, ours, peft_lora, peft_vera

PLANS = ("auto", "factored", "scaled", "merged", "dense")
KEPT = " kept"
FORMS = {"": None, " outlined": "4", KEPT: None}
"""What follows a method's name, and the knob that forces it: ``auto outlined`` is what was before.

What is kept finds its capture in a folder (`vera_fx.capture_cache`): another first step, the same steps."""


def roberta(layers: int) -> nn.Module:
    """RoBERTa's layers at hidden size 64, without dropout."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    return narrow_roberta(layers, intermediate_size=128, **off).train()


def case(layers: int) -> Case:
    """Query and value at rank 8, two sequences of 16 tokens."""
    return Case(f"host {layers}", "roberta", ("query", "value"), 8, layers, 2, 16)


def methods() -> dict[str, tuple[Callable[[nn.Module, Case], nn.Module], str | None]]:
    """Every method, and the value of VERA_FX_OUTLINE under which it makes its first step."""
    found: dict[str, tuple[Callable[[nn.Module, Case], nn.Module], str | None]] = {
        "floor": (floor, None),
        "peft": (peft_vera, None),
        "lora r=8": (peft_lora, None),
    }
    for plan in PLANS:
        for suffix, outline in FORMS.items() if plan == "auto" else [("", None)]:
            found[plan + suffix] = functools.partial(ours, plan=plan), outline
    return found


def make(name: str, base: nn.Module, sized: Case) -> System:
    """One method, compiled."""
    model = methods()[name][0](base, sized)
    trained = [p for p in model.parameters() if p.requires_grad]
    return System(name, torch.compile(model), trained)


def arguments(sized: Case, device: str = "cpu") -> dict[str, Any]:
    """One batch; every method gives a gradient for it."""
    torch.manual_seed(1)
    x = torch.randn(sized.batch, sized.length, 64, device=device)
    return {"inputs_embeds": x.requires_grad_()}


def first(system: System, batch: dict[str, Any]) -> float:
    """Seconds of the first step, under the form that the method stands for."""
    outline = methods()[system.name][1]
    before = os.environ.pop("VERA_FX_OUTLINE", None)
    if outline is not None:
        os.environ["VERA_FX_OUTLINE"] = outline
    start = time.perf_counter()
    system.step(batch)
    seconds = time.perf_counter() - start
    os.environ.pop("VERA_FX_OUTLINE", None)
    if before is not None:
        os.environ["VERA_FX_OUTLINE"] = before
    return seconds


def steps(layers: int, names: Sequence[str], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of a step; all methods in every round."""
    torch._dynamo.reset()
    sized, base = case(layers), roberta(layers).to(device)
    systems = [make(name, copy.deepcopy(base), sized) for name in names]
    batch = arguments(sized, device)
    for system in systems:
        first(system, batch)
        for _ in range(5):
            system.step(batch)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for system in systems:
            samples[system.name].append(_milliseconds(system, batch, device))
    return {name: statistics.median(found) for name, found in samples.items()}


def _milliseconds(system: System, batch: dict[str, Any], device: str) -> float:
    """Milliseconds of a step; on a CPU those that this process had, so that no neighbour counts."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait(device)
    start = clock()
    system.step(batch)
    wait(device)
    return 1e3 * (clock() - start)


def first_step(name: str, sized: Case) -> float:
    """Seconds of the first step in this process."""
    system, batch = make(name, roberta(sized.layers), sized), arguments(sized)
    if not name.endswith(KEPT):
        return first(system, batch)
    with vera_fx.capture_cache(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "captures"):
        return first(system, batch)


def first_steps(layers: int, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Seconds of the first step in a process with empty caches, and in one that finds the first's."""
    found: dict[str, tuple[float, float]] = {}
    allowed = {"TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1"}
    for name in names:
        with tempfile.TemporaryDirectory() as cache:
            run = functools.partial(
                apart,
                "benchmarks.host",
                name,
                case(layers),
                TORCHINDUCTOR_CACHE_DIR=cache,
                **allowed,
            )
            found[name] = run(), run()
    return found


def show(layers: int, found: dict[str, float], starts: dict[str, tuple[float, float]]) -> None:
    """Print one depth's table."""
    columns = ("", "ms", "/ peft", "beyond the floor / peft's", "ms a layer", "first step s")
    table = Table(*columns, title=f"{layers} tiny layers", title_justify="left")
    base, peft = found["floor"], found["peft"]
    for name in dict.fromkeys((*found, *starts)):
        cold, cells = starts.get(name), [""] * 4
        if (ms := found.get(name)) is not None:
            beyond = f"{(ms - base) / (peft - base):.2f}" if name != "floor" else ""
            cells = [f"{ms:.2f}", f"{ms / peft:.2f}", beyond, f"{ms / layers:.2f}"]
        table.add_row(name, *cells, "" if cold is None else f"{cold[0]:.1f}, {cold[1]:.1f}")
    console.print(table)


def main(
    layers: Annotated[list[int], typer.Option()] = [6, 12, 24, 48],  # noqa: B006
    names: Annotated[str, typer.Option("--methods", help="comma-separated")] = "",
    rounds: Annotated[int, typer.Option(min=4)] = 200,
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    first: Annotated[bool, typer.Option(help="time first steps as well")] = False,
    output: Annotated[Path, typer.Option()] = Path("out/bench_host.json"),
) -> None:
    """Time training steps of tiny layers, all methods interleaved."""
    torch.set_num_threads(1)
    chosen = names.split(",") if names else list(methods())
    results: list[dict[str, Any]] = []
    for count in layers:
        found = steps(count, [n for n in chosen if not n.endswith(KEPT)], rounds, device)
        starts = first_steps(count, chosen) if first else {}
        show(count, found, starts)
        results.append({"layers": count, "milliseconds": found, "first": starts})
        write(output, {"device": device, "results": results})


if __name__ == "__main__" and not answer(first_step):
    typer.run(main)
