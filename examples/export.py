"""Export a fine-tuned classifier, and run it where only torch, or only onnxruntime, is imported.

pip install 'vera-fx[demo,onnx]' onnxruntime
python examples/finetune.py                  # trains out/adapter
python examples/export.py                    # every form: same predictions? sizes, load and run times

AOTInductor needs a C++ compiler and a minute for each form; without one its forms are left out.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from export_runners import Runner
from finetune import HERE, Batches, bundled_model, load_base
from rich.console import Console
from rich.table import Table
from text_data import DataError, read_dataset
from transformers import AutoTokenizer, logging

import vera_fx

FORMS = ("merged", "constant", "input", "rows")
console = Console(width=120)


def export(model: Any, runtime: str, form: str, call: dict, path: Path) -> Path:
    """Write one form for one runtime."""
    if runtime == "onnxruntime":
        return vera_fx.export_onnx(model, path.with_suffix(".onnx"), kwargs=call, form=form)
    if runtime == "AOTInductor":
        return vera_fx.export_aoti(model, path.with_suffix(".pt2"), kwargs=call, form=form)
    program = vera_fx.export_program(model, kwargs=call, form=form)
    return vera_fx.save_program(program, path.with_suffix(".pt2"))


def arrays(model: Any, form: str, call: dict) -> dict[str, Any]:
    """A call with what the form takes besides, as NumPy arrays."""
    found = {name: tensor.numpy() for name, tensor in call.items()}
    if form in {"input", "rows"}:
        names = ["__base__", "default"] if form == "rows" else None
        vectors = vera_fx.program_vectors(model, names)
        found["vectors"] = {name: tensor.numpy() for name, tensor in vectors.items()}
    if form == "rows":
        found["adapter_index"] = np.ones(len(call["input_ids"]), dtype=np.int64)
    return found


def programs(
    model: Any, calls: list[dict], folder: Path, *, reuse: bool
) -> Iterator[tuple[str, Path, Runner]]:
    """Every form for every runtime: its name, its file and an interpreter that runs it."""
    runtimes = ["torch", "onnxruntime"] + ["AOTInductor"] * (shutil.which("g++") is not None)
    for runtime in runtimes:
        for form in FORMS:
            path = folder / f"{runtime}_{form}"
            files = [p for p in folder.glob(f"{path.name}.*") if p.suffix in {".pt2", ".onnx"}]
            start = time.perf_counter()
            made = files[0] if reuse and files else export(model, runtime, form, calls[0], path)
            console.print(f"{runtime}, {form}: {time.perf_counter() - start:.0f} s to export")
            yield (
                f"{runtime}, {form}",
                made,
                Runner(runtime, made, [arrays(model, form, c) for c in calls]),
            )


def here(model: Any, calls: list[dict]) -> Callable[[], float]:
    """All calls by a model in this process; the function returns the seconds."""

    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        for call in calls:
            model(**call)
        return time.perf_counter() - start

    return run


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, all in turns; the first round warms up and is not counted."""
    found = [{name: run() for name, run in runs.items()} for _ in range(rounds + 1)][1:]
    return {name: [times[name] for times in found] for name in runs}


def quartiles(seconds: list[float], unit: float) -> str:
    """Median and quartiles as multiples of ``unit``."""
    low, middle, high = (q / unit for q in statistics.quantiles(seconds, n=4))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def report(model: Any, calls: list[dict], folder: Path, rounds: int, *, reuse: bool) -> bool:
    """Export and run every form; prints a table and returns whether all predictions agree."""
    with torch.no_grad():
        expected = torch.cat([model(**call).logits for call in calls]).numpy()
    runs: dict[str, Callable[[], float]] = {"eager, adapted": here(model, calls)}
    runs["compiled, adapted"] = here(torch.compile(model, dynamic=True), calls)
    found = {
        name: (path, runner) for name, path, runner in programs(model, calls, folder, reuse=reuse)
    }
    seconds = interleaved(runs | {name: runner for name, (_, runner) in found.items()}, rounds)
    unit = statistics.median(seconds["eager, adapted"])
    table = Table(
        "form", "file", "load", "run / eager (quartiles)", "largest difference", "predictions"
    )
    rows: dict[str, Any] = {}
    for name, times in seconds.items():
        cells, row = ["", "", quartiles(times, unit), "", ""], {"seconds": times}
        if name in found:
            path, runner = found[name]
            logits = runner.logits()
            row |= {"bytes": path.stat().st_size, "loaded": runner.loaded}
            row["same"] = bool((logits.argmax(-1) == expected.argmax(-1)).all())
            cells[:2] = f"{row['bytes'] / 2**20:.1f} MiB", f"{runner.loaded:.1f} s"
            cells[3:] = f"{abs(logits - expected).max():.1e}", "same" if row["same"] else "OTHER"
        rows[name] = row
        table.add_row(name, *cells)
    console.print(table)
    (folder / "export.json").write_text(json.dumps(rows, indent=2) + "\n")
    return all(row.get("same", True) for row in rows.values())


def main(
    adapter: Annotated[Path, typer.Option(help="folder of the adapter")] = Path("out/adapter"),
    output: Annotated[Path, typer.Option(help="where the programs go")] = Path("out/programs"),
    sentences: Annotated[int, typer.Option(min=64, help="held-out sentences to run")] = 512,
    rounds: Annotated[int, typer.Option(min=2, help="how often each form is timed")] = 5,
    reuse: Annotated[bool, typer.Option(help="run the files of the last export")] = False,
) -> None:
    """Export the classifier that finetune.py has trained and check its predictions elsewhere."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    data = HERE / "data/sentiment/movies.tsv.gz"
    try:
        dataset = read_dataset(
            data, text="text", label="rating", ratings=True, held_out=1500, seed=0
        )
        folder = bundled_model()
        model = vera_fx.load_adapter(load_base(folder, dataset.classes, 0).eval(), adapter)
        batches = Batches(AutoTokenizer.from_pretrained(folder), 32, 64)
        calls = [dict(b) for b in batches(dataset.held_out[: sentences // 32 * 32], shuffle=False)]
        for call in calls:
            call.pop("labels")
        output.mkdir(parents=True, exist_ok=True)
        same = report(model, calls, output, rounds, reuse=reuse)
    except (DataError, OSError, vera_fx.VeraFxError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
