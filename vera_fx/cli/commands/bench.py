"""``vera-fx bench``: what steps of one's own model cost, beside PEFT's."""

from typing import Annotated

import torch
import typer

from vera_fx.bench.compare import compare, inputs_for
from vera_fx.bench.methods import Adapters, has_peft
from vera_fx.cli.arguments import Device, Json, Model, Threads
from vera_fx.cli.devices import device_of, use_threads
from vera_fx.cli.folders import load
from vera_fx.cli.main import reported
from vera_fx.cli.output import show
from vera_fx.config import check_choice

DTYPES = ("float32", "bfloat16", "float16")


@reported
def bench(
    model: Model,
    rank: Annotated[int, typer.Option("-r", "--rank", min=1, help="of VeRA")] = 256,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "-t", "--target", "--targets", help="module to adapt, repeated; else the architecture's"
        ),
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=1, help="of PEFT's LoRA")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="rows of a step")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="of a row; pictures have their own")] = 128,
    rounds: Annotated[int, typer.Option(min=2, help="how often each step is timed")] = 11,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="compile all models")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="of the base: float32, bfloat16 or float16")
    ] = "float32",
    device: Device = "auto",
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Time training steps and calls on a model: frozen, with vera_fx, with PEFT's VeRA and LoRA.

    All in turns in one process, over the same weights, on random inputs: medians, the spread between
    quartiles, and the memory that a step takes beyond what is held.
    """
    check_choice("dtype", dtype, DTYPES)
    use_threads(threads)
    where = device_of(device)
    base = load(model).to(device=where, dtype=getattr(torch, dtype))
    given = inputs_for(base, batch, tokens)
    adapters = Adapters(rank, targets, lora_rank)
    tables = compare(base, given, adapters, compiled=compiled, rounds=rounds)
    facts = {"model": type(base).__name__, "device": str(where), "dtype": dtype, "rank": rank}
    shape = {name: "x".join(map(str, value.shape)) for name, value in given.items()}
    more = {"inputs": shape, "compiled": compiled, "threads": torch.get_num_threads()}
    there = "compared" if has_peft() else "not installed, so not compared"
    show({**facts, **more, "rounds": rounds, "PEFT": there, **tables}, as_json=json)
