"""python -m examples.server: serves the adapters of a folder."""

from pathlib import Path
from typing import Annotated

import torch
import typer
import uvicorn

from examples.server.app import create_app
from examples.server.minilm import LABELS, serving


def main(
    folder: Annotated[Path, typer.Option()] = Path("out/server"),
    host: str = "127.0.0.1",
    port: int = 8000,
    capacity: int = 1024,
    max_batch: int = 32,
    max_wait: Annotated[float, typer.Option(help="seconds")] = 0.005,
    threads: Annotated[int, typer.Option(min=0, help="of torch; 0 for all cores")] = 0,
) -> None:
    """Serve until interrupted; requests that wait are answered first."""
    if threads:
        torch.set_num_threads(threads)
    classify, store = serving(folder, capacity)
    app = create_app(classify, store, LABELS, max_batch=max_batch, max_wait=max_wait)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=10)


if __name__ == "__main__":
    typer.run(main)
