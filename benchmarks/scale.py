"""Ten thousand adapters of RoBERTa-base's size: memory, loading, and batches that mix them.

python -m benchmarks.scale
"""

import copy
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import typer
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import vera_fx
from benchmarks.cases import QV, Case, build, inputs
from benchmarks.measure import Spread, interleaved
from benchmarks.report import console, resident, write

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROWS, FEW = 64, 10


def config(case: Case) -> vera_fx.VeraConfig:
    """Query and value, the vectors alone in the file."""
    return vera_fx.VeraConfig(
        r=case.r, target_modules=case.targets, save_projection=False, plan="factored"
    )


def make_folder(base: nn.Module, case: Case, folder: Path, count: int) -> None:
    """Write so many adapters as `save_adapter` does, with other values in each."""
    model = vera_fx.adapt(copy.deepcopy(base), config(case))
    kind = vera_fx.save_adapter(model, folder / "kind")
    with safe_open(kind / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for number in range(count):
        one = folder / "adapters" / f"a{number}"
        one.mkdir(parents=True, exist_ok=True)
        save_file({k: torch.randn_like(v) * 0.1 for k, v in state.items()}, one / WEIGHTS, metadata)
        shutil.copyfile(kind / CONFIG, one / CONFIG)


def served(base: nn.Module, folder: Path, capacity: int) -> tuple[Any, Any]:
    """A model with one adapter of its kind in the bank, and a store over the folder."""
    model = copy.deepcopy(base)
    vera_fx.load_adapter(model, folder / "kind", adapter_name="kind", plan="factored")
    return model, vera_fx.AdapterStore(model, folder / "adapters", capacity=capacity)


def loading(store: vera_fx.AdapterStore, count: int) -> dict[str, float]:
    """Milliseconds an adapter, for the first thousand and for all, and bytes an adapter."""
    before, start, first = resident(), time.perf_counter(), 0.0
    for number in range(count):
        store.load(f"a{number}")
        if number + 1 == min(1000, count):
            first = time.perf_counter() - start
    taken = time.perf_counter() - start
    return {
        "thousand_s": first * 1000 / min(1000, count),
        "all_s": taken,
        "own_bytes": store.bytes / count,
        "resident_bytes": (resident() - before) / count,
    }


def others_loading(base: nn.Module, folder: Path, count: int) -> dict[str, dict[str, float]]:
    """The same for adapters as modules: `vera_fx.load_adapter`, and PEFT's."""
    ours = copy.deepcopy(base)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "kind")
    methods: dict[str, Callable[[int], Any]] = {
        "vera_fx.load_adapter": lambda n: vera_fx.load_adapter(
            ours, folder / "adapters" / f"a{n}", adapter_name=f"a{n}"
        ),
        "PEFT load_adapter": lambda n: theirs.load_adapter(folder / "adapters" / f"a{n}", f"a{n}"),
    }
    found: dict[str, dict[str, float]] = {}
    for name, load in methods.items():
        load(0)
        before, start = resident(), time.perf_counter()
        for number in range(1, count + 1):
            load(number)
        taken = time.perf_counter() - start
        found[name] = {
            "thousand_s": 1000 * taken / count,
            "resident_bytes": (resident() - before) / count,
        }
    return found


def mixtures(
    few: nn.Module, many: nn.Module, count: int, arguments: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """One adapter for all rows by `set_adapter`; mixtures out of ten, and out of all."""
    draws = random.Random(0)

    def mixed(model: Any, distinct: int, among: int) -> Callable[[], Any]:
        def call() -> Any:  # other adapters every time
            chosen = [f"a{number}" for number in draws.sample(range(among), distinct)]
            return model(**arguments, adapter_names=[chosen[n % distinct] for n in range(ROWS)])

        return call

    found: dict[str, Callable[[], Any]] = {"uniform": lambda: few(**arguments)}
    found |= {f"{n} of {FEW}": mixed(few, n, FEW) for n in (1, 4, FEW)}
    found |= {f"{n} of {count}": mixed(many, n, count) for n in (1, 4, ROWS)}
    return found


def show(
    loads: dict[str, dict[str, float]], spreads: dict[str, Spread], store: vera_fx.AdapterStore
) -> None:
    """Print both tables."""
    table = Table("", "s for 1,000", "KiB resident an adapter", title="loading from disk")
    for name, load in loads.items():
        kib = load["resident_bytes"] / 1024
        table.add_row(name, f"{load['thousand_s']:.2f}", f"{kib:.0f}")
    console.print(table)
    console.print(f"{len(store.loaded())} in memory, {store.bytes / 2**30:.2f} GiB of tensors")
    table = Table("adapters in 64 rows", "ms (quartiles)", "to uniform")
    for name, spread in spreads.items():
        text = f"{spread.median:.0f} ({spread.low:.0f}-{spread.high:.0f})"
        table.add_row(name, text, f"{spread.median / spreads['uniform'].median:.3f}")
    console.print(table)


def main(
    adapters: Annotated[int, typer.Option(min=FEW)] = 10_000,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    rounds: Annotated[int, typer.Option(min=4)] = 5,
    folder: Annotated[Path, typer.Option(help="made if missing, about 1 GiB")] = Path("out/scale"),
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    output: Annotated[Path, typer.Option()] = Path("out/bench_scale.json"),
) -> None:
    """Load them all, then mix them: RoBERTa-base's shape, query and value at rank 256."""
    case = Case("scale", "roberta", QV["roberta"], 256, layers, ROWS, 16, device=device)
    base = build(case).eval().requires_grad_(requires_grad=False)
    if not (folder / "adapters" / f"a{adapters - 1}").exists():
        make_folder(base, case, folder, adapters)
    arguments = {key: value.detach() for key, value in inputs(case).items()}
    model, store = served(base, folder, adapters)
    loads = {"AdapterStore.load": loading(store, adapters)}
    loads |= others_loading(base, folder, 50)
    few = copy.deepcopy(base)
    for number in range(FEW):
        place = folder / "adapters" / f"a{number}"
        vera_fx.load_adapter(few, place, adapter_name=f"a{number}", plan="factored")
    with torch.inference_mode():
        spreads = interleaved(
            mixtures(few, model, adapters, arguments), rounds, inner=1, device=device
        )
    show(loads, spreads, store)
    times = {name: vars(spread) for name, spread in spreads.items()}
    write(output, {"adapters": adapters, "layers": layers, "loading": loads, "times_ms": times})


if __name__ == "__main__":
    typer.run(main)
