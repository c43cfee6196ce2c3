"""``vera-fx train``: a run by a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vera_fx.cli import runs
from vera_fx.cli.arguments import Json
from vera_fx.cli.flags import with_recipe_flags
from vera_fx.cli.main import reported
from vera_fx.cli.output import show


@with_recipe_flags
@reported
def train(
    out: Annotated[Path, typer.Argument(help="folder of the run, new or to go on with")],
    recipe: Annotated[Path | None, typer.Option(help="YAML file; flags win over it")] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Train an adapter; the same command goes on with a run that was stopped or killed."""
    show(runs.train(out, recipe, flags), as_json=json)
