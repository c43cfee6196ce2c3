"""Peak memory of training steps: each method in a process of its own, read off the kernel.

python -m benchmarks.memory
"""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.cases import QV, Case, build, inputs
from benchmarks.devices import begin_peak, wait
from benchmarks.devices import peak as most
from benchmarks.processes import answer, apart
from benchmarks.report import console, resident, write
from benchmarks.systems import make

NAMES = ("floor", "peft", "lora r=8", "ours")
CASES = (
    Case("roberta q,v r=1024", "roberta", QV["roberta"], 1024, 2, 16, 128),
    Case("roberta q,v r=256", "roberta", QV["roberta"], 256, 2, 16, 128),
    Case("llama all r=256", "llama", "all-linear", 256, 2, 16, 128),
)


def peak(name: str, case: Case) -> dict[str, float]:
    """MiB that a training step takes beyond what the model, the adapter and AdamW hold."""
    system = make(name, build(case), case)
    arguments = inputs(case)
    optimizer = torch.optim.AdamW(system.trained, lr=1e-4) if system.trained else None

    def step() -> None:
        gradients: dict[Any, Any] = {}
        hooks = [p.register_post_accumulate_grad_hook(_keep(gradients)) for p in system.trained]
        system.step(arguments)
        for hook in hooks:
            hook.remove()
        if optimizer is not None:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step()
    if case.device != "cpu":
        return _on_device(step, case.device)
    ctypes.CDLL(None).malloc_trim(0)
    before = resident() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # begins the high-water mark anew
    step()
    return {"step": resident(peak=True) / 2**20 - before, "resident": before}


def _on_device(step: Callable[[], None], device: str) -> dict[str, float]:
    wait(device)
    before = torch.cuda.memory_allocated(device) / 2**20
    begin_peak(device)
    step()
    wait(device)
    return {"step": most(device) - before, "resident": before}


def _keep(gradients: dict[Any, Any]) -> Any:
    def keep(parameter: torch.Tensor) -> None:
        gradients[parameter] = parameter.grad

    return keep


def measured(name: str, case: Case) -> dict[str, float]:
    """`peak` in a process of its own, which gives freed memory back to the kernel at once."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return apart("benchmarks.memory", name, case, **at_once)


def main(  # noqa: PLR0913, PLR0917 - one argument per option
    tokens: Annotated[list[int], typer.Option(help="tokens per step")] = [2048, 8192],  # noqa: B006
    layers: Annotated[int, typer.Option(min=1)] = 2,
    only: Annotated[str, typer.Option(help="run the cases whose name contains this")] = "",
    checkpointed: Annotated[bool, typer.Option(help="with gradient checkpointing")] = False,
    device: Annotated[str, typer.Option(help="where models are: cpu or cuda")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="bases in bfloat16")] = False,
    quantised: Annotated[
        str, typer.Option(help="quantised bases: nf4 or int8 (QLoRA and QVeRA)")
    ] = "",
    output: Annotated[Path, typer.Option()] = Path("out/bench_memory.json"),
) -> None:
    """Peak memory of compiled training steps with AdamW, above what is resident between steps."""
    columns = ("case", "tokens", *NAMES, "ours beyond floor / peft's", "ours / lora")
    table, results = Table(*columns, title="MiB of a step"), []
    dtype = torch.bfloat16 if bf16 else torch.float32
    for case in CASES:
        for count in tokens if only in case.name else ():
            batch = count // case.length
            sized = replace(
                case,
                layers=layers,
                batch=batch,
                checkpointed=checkpointed,
                dtype=dtype,
                device=device,
                quantised=quantised,
            )
            found = {name: measured(name, sized) for name in NAMES}
            step = {name: values["step"] for name, values in found.items()}
            share = (step["ours"] - step["floor"]) / (step["peft"] - step["floor"])
            ratio = step["ours"] / step["lora r=8"]
            table.add_row(
                case.name,
                str(count),
                *(f"{step[name]:.0f}" for name in NAMES),
                f"{share:.2f}",
                f"{ratio:.2f}",
            )
            results.append(
                {
                    "case": case.name,
                    "tokens": count,
                    "layers": layers,
                    "checkpointed": checkpointed,
                    "dtype": str(dtype),
                    "quantised": quantised,
                    "mib": found,
                }
            )
    console.print(table)
    write(output, {"results": results})


if __name__ == "__main__" and not answer(peak):
    typer.run(main)
