"""What layers that run graphs of their own cost the host: equal tiny layers, each sharded by FSDP2.

python -m benchmarks.host_parts                       # 12 layers; one gloo process, then two
python -m benchmarks.host_parts --layers 24 --worlds 1

Milliseconds of CPU time of a training step, all methods in every round. ``whole`` is the same model without
FSDP2, where it is one graph.
"""

import copy
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import vera_fx
from benchmarks.host import arguments, case, roberta
from benchmarks.report import console, write
from benchmarks.systems import System, floor, ours, peft_lora, peft_vera

METHODS: dict[str, Callable[..., nn.Module]] = {
    "floor": floor,
    "peft": peft_vera,
    "lora r=8": peft_lora,
    "ours": functools.partial(ours, plan="factored"),
}
FORMS = ("eager", "compiled")


def layers_of(model: Any) -> Any:
    """The model's equal layers, whatever stands around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.encoder.layer


def sharded(model: Any, *, compiled: bool) -> nn.Module:
    """Every layer and the root by FSDP2; layers compiled one by one, as its users do."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers_of(model):
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make(name: str, base: nn.Module, layers: int, form: str, *, whole: bool) -> System:
    """One method in one form; ``whole``: not sharded."""
    model, compiled = METHODS[name](base, case(layers)), form == "compiled"
    if not whole:
        model = sharded(model, compiled=compiled)
    elif compiled:
        model.compile()
    return System(name, model, [p for p in model.parameters() if p.requires_grad])


def measured(layers: int, form: str, rounds: int, *, whole: bool) -> dict[str, float]:
    """Median milliseconds of a step by method."""
    torch._dynamo.reset()
    base, batch = roberta(layers), arguments(case(layers))
    systems = [make(name, copy.deepcopy(base), layers, form, whole=whole) for name in METHODS]
    samples: dict[str, list[float]] = {name: [] for name in METHODS}
    for number in range(rounds + 5):
        for system in systems:
            ms = _milliseconds(system, batch)
            if number >= 5:
                samples[system.name].append(ms)
    return {name: statistics.median(found) for name, found in samples.items()}


def _milliseconds(system: System, batch: dict[str, Any]) -> float:
    """Milliseconds that this thread had: neither neighbours nor waiting for the other process count."""
    dist.barrier()
    start = time.thread_time()
    system.step(batch)
    return 1e3 * (time.thread_time() - start)


def equal_parts(layers: int) -> list[int]:
    """For each capture that a step of sharded layers makes, how many parts share it."""
    model = sharded(METHODS["ours"](roberta(layers), case(layers)), compiled=False)
    System("ours", model, []).step(arguments(case(layers)))
    return [len(row.parts) for row in vera_fx.explain(model).shared]


def _work(rank: int, world: int, port: int, given: tuple[int, int], results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    layers, rounds = given
    for form in FORMS:
        for whole in (True, False) if world == 1 else (False,):
            found = measured(layers, form, rounds, whole=whole)
            if rank == 0:
                where = "whole" if whole else f"FSDP2, {world} process{'es' * (world > 1)}"
                results.put({"where": where, "form": form, "milliseconds": found})
    parts = equal_parts(layers)
    if rank == 0:
        results.put({"parts of a capture": parts})
    dist.destroy_process_group()


def run(world: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    """All measurements with so many processes; the last says how parts shared captures."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), 29500 + os.getpid() % 1000 + world
    given = (layers, rounds)
    processes = [
        context.Process(target=_work, args=(rank, world, port, given, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    count = len(FORMS) * (2 if world == 1 else 1) + 1
    found = [results.get(timeout=900) for _ in range(count)]
    for process in processes:
        process.join()
    return found


def show(layers: int, found: list[dict[str, Any]]) -> None:
    """Milliseconds a layer by method, and what the branches add as a share of what PEFT's add."""
    columns = ("where", "form", *(f"{name}, ms a layer" for name in METHODS), "ours / peft")
    table = Table(*columns, title=f"{layers} tiny layers", title_justify="left")
    for row in found:
        ms = row["milliseconds"]
        cells = (f"{ms[name] / layers:.3f}" for name in METHODS)
        table.add_row(row["where"], row["form"], *cells, f"{ms['ours'] / ms['peft']:.2f}")
    console.print(table)


def main(
    layers: Annotated[int, typer.Option(min=2)] = 12,
    worlds: Annotated[str, typer.Option(help="numbers of processes, comma-separated")] = "1,2",
    rounds: Annotated[int, typer.Option(min=4)] = 60,
    output: Annotated[Path, typer.Option()] = Path("out/bench_host_parts.json"),
) -> None:
    """Time training steps of tiny sharded layers, all methods interleaved."""
    rows: list[dict[str, Any]] = []
    shares: list[dict[str, Any]] = []
    for world in map(int, worlds.split(",")):
        *found, parts = run(world, layers, rounds)
        rows += found
        shares.append({"processes": world, **parts})
    show(layers, rows)
    for share in shares:
        console.print(", ".join(f"{key}: {value}" for key, value in share.items()))
    write(output, {"layers": layers, "rounds": rounds, "results": rows, "parts": shares})


if __name__ == "__main__":
    typer.run(main)
