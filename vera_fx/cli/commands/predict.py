"""``vera-fx predict``: what a finished run says."""

from pathlib import Path
from typing import Annotated

import typer

from vera_fx.cli import runs
from vera_fx.cli.arguments import Columns, Moved, Run
from vera_fx.cli.folders import check_new
from vera_fx.cli.main import reported
from vera_fx.cli.output import show


@reported
def predict(
    run: Run,
    data: Annotated[Path | None, typer.Argument(help="rows without labels")] = None,
    text: Annotated[list[str] | None, typer.Option(help="instead of data, repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL file to write; else stdout")] = None,
    model: Moved = None,
    columns: Columns = None,
    new_tokens: Annotated[int | None, typer.Option(help="most of a generated answer")] = None,
) -> None:
    """Ask a finished run: classes, vectors or texts, a JSON line for each row."""
    if out is not None:
        check_new(out)
    answers = runs.predict(run, data, text or [], {"model": model, "columns": columns}, new_tokens)
    written = runs.write(answers, out)
    if written is not None:
        show({"written": str(out), "rows": written}, as_json=False)
