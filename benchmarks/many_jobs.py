"""Many adapters trained in one batch, against the same jobs one after the other: ours, PEFT's VeRA and LoRA.

python -m benchmarks.many_jobs
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import typer
from rich.table import Table
from torch import nn

import vera_fx
from benchmarks.measure import interleaved
from benchmarks.report import console, write
from vera_fx.training.examples import padding_for
from vera_fx.training.forward import Forward
from vera_fx.training.many import ManyJobs

SHAPES = ("minilm", "llama")
TARGETS = {"minilm": ["query", "value"], "llama": "all-linear"}
SYSTEMS = ("one batch", "one adapter", "ours in turn", "PEFT VeRA in turn", "PEFT LoRA in turn")
RANK = 256


def base_of(shape: str, device: str = "cpu") -> nn.Module:
    """MiniLM's layers with a classifier, or two layers of Llama's architecture; random weights."""
    import transformers

    torch.manual_seed(0)
    if shape == "llama":
        sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
        config: Any = transformers.LlamaConfig(vocab_size=1000, num_hidden_layers=2, **sizes)
        return transformers.LlamaForCausalLM(config).to(device)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=1000, num_hidden_layers=6, **sizes, **off)
    return transformers.BertForSequenceClassification(config).to(device)


def data_of(shape: str, rows: int, length: int) -> list[dict[str, Any]]:
    """As many examples, all of one length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 1000, (rows, length), generator=generator)
    mask = torch.ones(length, dtype=torch.long)
    return [
        {
            "input_ids": row,
            "attention_mask": mask,
            "labels": row if shape == "llama" else int(row[0]) % 2,
        }
        for row in ids
    ]


def one_batch(
    shape: str, jobs: int, rows: int, length: int, compiled: bool, device: str
) -> Callable[[], None]:
    """A step of all jobs in one batch, optimiser included."""
    model = base_of(shape, device)
    call = torch.compile(model) if compiled else model
    many = ManyJobs(Forward(model, call, padding_for(0)))
    data = data_of(shape, rows, length)
    settings = vera_fx.TrainSettings(steps=10**6, batch_size=rows // jobs, shuffle=False)
    config = vera_fx.VeraConfig(r=RANK, target_modules=TARGETS[shape])
    for number in range(jobs):
        many.add(f"job{number}", config, data[number * rows // jobs :], settings)
    model.train()
    return many.step


def in_turn(
    shape: str, jobs: int, rows: int, length: int, model: nn.Module, compiled: bool
) -> Callable[[], None]:
    """The same jobs one after the other: as many small steps of a model with one adapter."""
    call = torch.compile(model.train()) if compiled else model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    data, each = data_of(shape, rows, length), rows // jobs
    device = trained[0].device
    batches = [
        {name: value.to(device) for name, value in padding_for(0)(data[at : at + each]).items()}
        for at in range(0, rows, each)
    ]

    def step() -> None:
        for batch in batches:
            call(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def make(
    system: str,
    shape: str,
    jobs: int,
    rows: int,
    length: int,
    compiled: bool,
    device: str = "cpu",
) -> Callable[[], None]:
    """One round of one system: a step of every job."""
    if system == "one batch":
        return one_batch(shape, jobs, rows, length, compiled, device)
    base, targets = base_of(shape, device), TARGETS[shape]
    jobs = 1 if system == "one adapter" else jobs
    if system in {"one adapter", "ours in turn"}:
        model: Any = vera_fx.adapt(base, vera_fx.VeraConfig(r=RANK, target_modules=targets))
    elif system == "PEFT VeRA in turn":
        config: Any = peft.VeraConfig(r=RANK, target_modules=targets, save_projection=False)
        model = peft.get_peft_model(base, config)
    else:
        model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=targets))
    return in_turn(shape, jobs, rows, length, model, compiled)


def peak(system: str, shape: str, jobs: int, rows: int, length: int) -> float:
    """MiB that a process of its own holds at most from the second round on, its imports left out."""
    code = (
        "from benchmarks.many_jobs import *; from benchmarks.report import resident; before = resident(); "
        f"step = make({system!r}, {shape!r}, {jobs}, {rows}, {length}, False); step(); step(); "
        "Path('/proc/self/clear_refs').write_text('5'); step(); print((resident(peak=True) - before) / 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measured(  # noqa: PLR0913
    shape: str,
    jobs: int,
    rows: int,
    length: int,
    rounds: int,
    systems: list[str],
    *,
    compiled: bool,
    device: str,
) -> dict[str, Any]:
    """Milliseconds of a round of each system, in turns."""
    torch._dynamo.reset()
    runs = {name: make(name, shape, jobs, rows, length, compiled, device) for name in systems}
    spreads = interleaved(runs, rounds, inner=1, device=device)
    return {name: vars(spread) for name, spread in spreads.items()}


def main(  # noqa: PLR0913, PLR0917
    jobs: Annotated[list[int], typer.Option(help="how many at once")] = [1, 4, 16, 64],  # noqa: B006
    shapes: Annotated[list[str], typer.Option(help="minilm, llama")] = ["minilm", "llama"],  # noqa: B006
    systems: Annotated[list[str], typer.Option(help="beside 'one batch'")] = list(SYSTEMS[1:]),  # noqa: B006
    rows: Annotated[int, typer.Option(help="of all jobs together")] = 64,
    length: Annotated[int, typer.Option(help="tokens of a row")] = 16,
    rounds: Annotated[int, typer.Option(min=4)] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--eager")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory")] = True,
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    output: Annotated[Path, typer.Option()] = Path("out/bench_many_jobs.json"),
) -> None:
    """Steps with AdamW: 1 to 64 jobs at equal total rows; times as ratios to all of them in one batch."""
    found: list[dict[str, Any]] = []
    table = Table(
        "shape", "jobs", "ms, one batch", *systems, "MiB", title=f"{rows} rows x {length}"
    )
    for shape in shapes:
        for count in jobs:
            names = [SYSTEMS[0], *systems]
            spreads = measured(
                shape, count, rows, length, rounds, names, compiled=compiled, device=device
            )
            mine = spreads[SYSTEMS[0]]
            names = [SYSTEMS[0], "ours in turn"] if memory and device == "cpu" else []
            most = {name: peak(name, shape, count, rows, length) for name in names}
            times = [f"{spreads[name]['median'] / mine['median']:.2f}" for name in systems]
            spread = f"{mine['median']:.0f} ({mine['low']:.0f}-{mine['high']:.0f})"
            row = (shape, str(count), spread, *times, ", ".join(f"{v:.0f}" for v in most.values()))
            table.add_row(*row)
            console.print(*row, highlight=False)
            found.append({"shape": shape, "jobs": count, "ms": spreads, "mib": most})
    console.print(table)
    console.print("MiB at most: in one batch, in turn. One adapter: a step of one on as many rows.")
    write(
        output,
        {"rows": rows, "length": length, "compiled": compiled, "device": device, "results": found},
    )


if __name__ == "__main__":
    typer.run(main)
