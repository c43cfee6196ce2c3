"""``vera-fx serve``: a classifier or an embedder and a folder of adapters, over HTTP."""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vera_fx.cli.arguments import Device, Model, Threads
from vera_fx.cli.devices import device_of, use_threads
from vera_fx.cli.flags import with_limit_flags
from vera_fx.cli.main import reported
from vera_fx.errors import ConfigError
from vera_fx.serving.limits import Limits, key_for_changes


@with_limit_flags(Limits)
@reported
def serve(
    model: Model,
    store: Annotated[Path, typer.Argument(help="folder with a folder for each adapter")],
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="to listen at")] = 8000,
    capacity: Annotated[int, typer.Option(min=1, help="adapters kept in memory")] = 1024,
    length: Annotated[
        int | None, typer.Option(min=1, help="most tokens of a text; else 256, or the model's most")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="of an embedder: mean, cls or last; else the model's own")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="most texts in a batch; else 32, or the capacity")
    ] = None,
    max_wait: Annotated[
        float, typer.Option(min=0, help="seconds that a text waits for others")
    ] = 0.005,
    threads: Threads = 0,
    device: Device = "auto",
    **limits: Any,
) -> None:
    """Serve a classifier or an embedder and its adapters over HTTP until interrupted.

    Which of the two, the model's folder says. Uploads and deletes need the key in VERA_FX_SERVER_KEY.
    """
    bounds, key = Limits(**limits), key_for_changes()
    _check_installed()
    use_threads(threads)
    from vera_fx.serving.folders import open_served

    choices = {"capacity": capacity, "length": length, "pooling": pooling}
    served = open_served(model, store, device=device_of(device), **choices)
    batches = {"max_batch": max_batch or min(32, capacity), "max_wait": max_wait}
    app = application(served, key=key, limits=bounds, **batches)
    facts = ", ".join(f"{name} {value}" for name, value in served.facts.items())
    sys.stderr.write(f"serves at http://{host}:{port}: {facts}\n")
    _run(app, host, port, bounds)


def application(served: Any, **options: Any) -> Any:
    """The application over what was opened, warmed up.

    Raises:
        ConfigError: a batch may name more adapters than the store keeps.
    """
    from vera_fx.serving.app import create_app
    from vera_fx.serving.classify import warm_up
    from vera_fx.serving.embed_app import create_embedding_app

    warm_up(served.answer, served.store)
    if served.labels:
        return create_app(served.answer, served.store, served.labels, **options)
    return create_embedding_app(served.answer, served.store, **options)


def _run(app: Any, host: str, port: int, limits: Limits) -> None:
    """Answer until interrupted; requests that wait are answered first."""
    import uvicorn

    from vera_fx.serving.door import server_options

    uvicorn.run(app, host=host, port=port, **server_options(limits))


def _check_installed() -> None:
    for library in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(f"{library} is not installed; pip install 'vera-fx[server]'")
