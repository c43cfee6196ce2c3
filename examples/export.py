"""Export a fine-tuned classifier, and run it where only torch, or only onnxruntime, is imported.

pip install 'vera-fx[demo,onnx]' onnxruntime
python examples/finetune.py                  # trains out/adapter
python examples/export.py                    # every form: same predictions? sizes, load and run times
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from finetune import HERE, Batches, bundled_model, load_base
from rich.console import Console
from rich.table import Table
from text_data import DataError, read_dataset
from transformers import AutoTokenizer, logging

import vera_fx

console = Console()

TORCH = """
import json, sys, time, torch
torch.set_num_threads(1)
program, calls, results = sys.argv[1:]
calls = torch.load(calls)
start = time.perf_counter()
run = torch.export.load(program).module()
loaded = time.perf_counter()
with torch.no_grad():
    run(**calls[0])
    begin = time.perf_counter()
    logits = torch.cat([run(**call)["logits"] for call in calls])
end = time.perf_counter()
torch.save(logits, results)
unwanted = {"vera_fx", "transformers", "peft"} & set(sys.modules)
assert not unwanted, unwanted
print(json.dumps([loaded - start, end - begin]))
"""

ONNX = """
import json, sys, time, numpy, onnxruntime
program, calls, results = sys.argv[1:]
calls = numpy.load(calls, allow_pickle=True)["calls"]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
start = time.perf_counter()
session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
loaded = time.perf_counter()
session.run(None, calls[0])
begin = time.perf_counter()
logits = numpy.concatenate([session.run(None, call)[0] for call in calls])
end = time.perf_counter()
numpy.save(results, logits)
unwanted = {"vera_fx", "transformers", "torch"} & set(sys.modules)
assert not unwanted, unwanted
print(json.dumps([loaded - start, end - begin]))
"""


def elsewhere(code: str, *paths: Path) -> tuple[float, float]:
    """Run ``code`` in an interpreter of its own; returns the seconds to load and to run."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *paths], check=True, stdout=subprocess.PIPE, text=True
    )
    loaded, ran = json.loads(done.stdout)
    return loaded, ran


def run_torch(model: Any, form: str, calls: list[dict], folder: Path) -> tuple[Any, ...]:
    """Export a torch program and run it; returns its size, the two times and the logits."""
    program = vera_fx.export_program(model, kwargs=calls[0], form=form)
    path = vera_fx.save_program(program, folder / f"{form}.pt2")
    extra = {"vectors": vera_fx.program_vectors(model)} if form == "input" else {}
    torch.save([{**call, **extra} for call in calls], folder / "calls.pt")
    times = elsewhere(TORCH, path, folder / "calls.pt", folder / "logits.pt")
    return path.stat().st_size, *times, torch.load(folder / "logits.pt")


def run_onnx(model: Any, form: str, calls: list[dict], folder: Path) -> tuple[Any, ...]:
    """The same with an ONNX file in onnxruntime."""
    path = vera_fx.export_onnx(model, folder / f"{form}.onnx", kwargs=calls[0], form=form)
    extra = vera_fx.program_vectors(model) if form == "input" else {}
    fed = [{name: x.numpy() for name, x in {**call, **extra}.items()} for call in calls]
    np.savez(folder / "calls.npz", calls=np.array(fed, dtype=object))
    times = elsewhere(ONNX, path, folder / "calls.npz", folder / "logits.npy")
    return path.stat().st_size, *times, torch.from_numpy(np.load(folder / "logits.npy"))


@torch.no_grad()
def eager(model: Any, calls: list[dict]) -> tuple[float, torch.Tensor]:
    """Seconds and logits of the adapted model itself."""
    model(**calls[0])
    begin = time.perf_counter()
    logits = torch.cat([model(**call).logits for call in calls])
    return time.perf_counter() - begin, logits


def report(model: Any, calls: list[dict], folder: Path) -> bool:
    """Export and run every form; prints a table and returns whether all predictions agree."""
    seconds, expected = eager(model, calls)
    table = Table("form", "file", "load", "run / eager", "largest difference", "predictions")
    table.add_row("eager, adapted", "", "", "1.00", "", "")
    same = True
    for name, run in (("torch", run_torch), ("onnxruntime", run_onnx)):
        for form in ("merged", "constant", "input"):
            size, loaded, ran, logits = run(model, form, calls, folder)
            agree = torch.equal(logits.argmax(-1), expected.argmax(-1))
            same &= agree
            distance = f"{(logits - expected).abs().max().item():.1e}"
            row = (f"{size / 2**20:.1f} MiB", f"{1e3 * loaded:.0f} ms", f"{ran / seconds:.2f}")
            table.add_row(f"{name}, {form}", *row, distance, "same" if agree else "OTHER")
    console.print(table)
    return same


def main(
    adapter: Annotated[Path, typer.Option(help="folder of the adapter")] = Path("out/adapter"),
    output: Annotated[Path, typer.Option(help="where the programs go")] = Path("out/programs"),
    sentences: Annotated[int, typer.Option(min=64, help="held-out sentences to run")] = 512,
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
        same = report(model, calls, output)
    except (DataError, OSError, vera_fx.VeraFxError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
