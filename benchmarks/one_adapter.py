"""The example server for a single adapter, merged into the base: what one process per adapter runs.

python -m benchmarks.one_adapter --adapter movies --port 8001
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
import uvicorn

import vera_fx
from examples.server.minilm import LABELS, load_base
from vera_fx.serving.app import create_app
from vera_fx.serving.classify import classifier
from vera_fx.serving.limits import Limits


def main(
    adapter: Annotated[str, typer.Option()],
    port: Annotated[int, typer.Option()],
    folder: Annotated[Path, typer.Option()] = Path("out/server"),
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str, typer.Option(help="where the model is")] = "cpu",
) -> None:
    """Serve until interrupted."""
    torch.set_num_threads(threads)
    model, tokenizer = load_base()
    vera_fx.load_adapter(model.to(device), folder / "adapters" / adapter)
    store = vera_fx.AdapterStore(model, folder / "adapters", capacity=64)  # says who exists
    vera_fx.merge(model)
    judge = classifier(model, tokenizer, mixed=False)

    def classify(texts: Sequence[str], _names: Sequence[str]) -> list[list[float]]:
        return judge(texts, [])

    classify(["warm up"], [])
    classify(["warm up"] * 2, [])
    app = create_app(classify, store, LABELS, limits=Limits(rate=0))
    uvicorn.run(app, port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
