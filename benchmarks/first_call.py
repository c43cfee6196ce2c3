"""Time from a model to its first eager result: adapting and the first call, beside torch.export alone.

Kept: the same as in a later process, which finds the capture in a folder (`vera_fx.capture_cache`).

python -m benchmarks.first_call

Seconds of CPU time of the one thread, as exports take minutes on a machine that is shared. Methods take
turns; the median of the ratios counts.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn
from torch.export import Dim

import vera_fx
from benchmarks.cases import narrow_roberta
from benchmarks.report import console, write

TARGETS = {"llama": "all-linear", "roberta": ["query", "value"]}


def tiny_llama(layers: int) -> nn.Module:
    """Layers that cost little but their operators, with seven sites each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def build(name: str, layers: int) -> nn.Module:
    """The model, in train mode."""
    torch.manual_seed(0)
    return (tiny_llama(layers) if name == "llama" else narrow_roberta(layers)).train()


def inputs() -> dict[str, Any]:
    """One batch of token numbers."""
    return {"input_ids": torch.randint(0, 100, (2, 16))}


def exported(model: nn.Module, _: str) -> None:
    """What the library cannot do without: the export, with sizes open as it opens them, and one call."""
    sizes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    program = torch.export.export(model, (), inputs(), strict=False, dynamic_shapes=sizes)
    program.module()(**inputs())


def adapted(model: nn.Module, name: str) -> None:
    """The same with adapters."""
    vera_fx.adapt(model, vera_fx.VeraConfig(r=8, target_modules=TARGETS[name]))
    model(**inputs())


def kept(model: nn.Module, name: str) -> None:
    """The same, with the capture in a folder since the first round."""
    with vera_fx.capture_cache(Path(tempfile.gettempdir()) / f"vera_fx-first-call-{os.getpid()}"):
        adapted(model, name)


def seconds(method: Any, name: str, layers: int) -> float:
    """CPU seconds of one method."""
    model = build(name, layers)
    start = time.thread_time()
    method(model, name)
    return time.thread_time() - start


def main(
    layers: Annotated[list[int], typer.Option()] = [16, 64],  # noqa: B006
    rounds: Annotated[int, typer.Option()] = 3,
    output: Annotated[Path, typer.Option()] = Path("out/bench_first_call.json"),
) -> None:
    """Time all, in turns, after a small model has warmed the process up."""
    torch.set_num_threads(1)
    methods = (exported, adapted, kept)
    columns = ("export", "adapt and first call", "ratio", "capture kept", "ratio")
    table, results = Table("model", "layers", *columns), []
    for name in TARGETS:
        for count in (2, *layers):
            seconds(kept, name, count)  # fills the folder
        for method in methods:
            seconds(method, name, 2)
        for count in layers:
            taken = [[seconds(method, name, count) for method in methods] for _ in range(rounds)]
            medians = [statistics.median(column) for column in zip(*taken, strict=True)]
            ours, later = (statistics.median(t[i] / t[0] for t in taken) for i in (1, 2))
            plain, first, again = (f"{median:.2f}" for median in medians)
            table.add_row(name, str(count), plain, first, f"{ours:.2f}", again, f"{later:.2f}")
            results.append({
                "model": name, "layers": count, "seconds": taken, "ratio": ours, "kept": later,
            })  # fmt: skip
    console.print(table)
    write(output, {"results": results})


if __name__ == "__main__":
    typer.run(main)
