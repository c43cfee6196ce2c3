"""python -m examples.server: serves the adapters of a folder."""

from pathlib import Path
from typing import Annotated

import torch
import typer
import uvicorn

import vera_fx
from examples.server.minilm import LABELS, serving
from vera_fx.cli.devices import device_of
from vera_fx.serving.app import create_app
from vera_fx.serving.door import server_options
from vera_fx.serving.limits import Limits, key_for_changes


def main(
    folder: Annotated[Path, typer.Option()] = Path("out/server"),
    host: str = "127.0.0.1",
    port: int = 8000,
    capacity: int = 1024,
    max_batch: int = 32,
    max_wait: Annotated[float, typer.Option(help="seconds")] = 0.005,
    threads: Annotated[int, typer.Option(min=0, help="of torch; 0 for all cores")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, or one as cuda:0")] = "cpu",
    rate: Annotated[
        float, typer.Option(min=0, help="requests of an address per second; 0 for no bound")
    ] = Limits.rate,
) -> None:
    """Serve until interrupted; requests that wait are answered first.

    Uploads and deletes need the key in the environment variable VERA_FX_SERVER_KEY.
    """
    try:
        key, place = key_for_changes(), device_of(device)
    except vera_fx.ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if threads:
        torch.set_num_threads(threads)
    classify, store = serving(folder, capacity, place)
    limits = Limits(rate=rate)
    options = {"key": key, "limits": limits, "max_batch": max_batch, "max_wait": max_wait}
    app = create_app(classify, store, LABELS, **options)
    uvicorn.run(app, host=host, port=port, **server_options(limits))


if __name__ == "__main__":
    typer.run(main)
