"""``vera-fx eval``: the figures of a finished run."""

from pathlib import Path
from typing import Annotated

import typer

from vera_fx.cli import runs
from vera_fx.cli.arguments import Columns, Json, Moved, Run
from vera_fx.cli.main import reported
from vera_fx.cli.output import show


@reported
def evaluate(
    run: Run,
    data: Annotated[Path, typer.Argument(help="rows with labels, as for training")],
    model: Moved = None,
    columns: Columns = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="rows in a batch")] = None,
    json: Json = False,
) -> None:
    """The figures of a finished run over other data."""
    changes = {"model": model, "columns": columns, "batch_size": batch_size}
    show(runs.evaluate(run, data, changes), as_json=json)
