"""The commands, and what they take."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vera_fx.cli import commands, runs
from vera_fx.cli.doctor import diagnosis
from vera_fx.cli.flags import with_recipe_flags
from vera_fx.cli.folders import check_new
from vera_fx.cli.inspect import adapter_report, is_adapter, model_report
from vera_fx.cli.main import reported
from vera_fx.cli.output import show
from vera_fx.cli.serve import serve as serve_folders

app = typer.Typer(
    name="vera-fx",
    help="VeRA adapters by a graph pass: train, evaluate, predict, look at, merge, convert, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Model = Annotated[Path, typer.Argument(help="folder of a transformers model")]
Adapter = Annotated[Path, typer.Argument(help="folder of a saved adapter, PEFT's or ours")]
Out = Annotated[Path, typer.Argument(help="folder or file to write; must not exist")]
Run = Annotated[Path, typer.Argument(help="folder of a finished run")]
Moved = Annotated[Path | None, typer.Option("--model", help="where the model is now")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="name=column, repeated")]
Batch = Annotated[int | None, typer.Option("--batch-size", min=1, help="rows in a batch")]


@app.command()
@reported
def doctor(json: Json = False) -> None:
    """Versions, devices, what this machine multiplies fast, and which extras are installed."""
    show(diagnosis(), as_json=json)


@app.command()
@reported
def inspect(
    folder: Annotated[Path, typer.Argument(help="folder of a model or of an adapter")],
    rank: Annotated[int, typer.Option("-r", "--rank", help="of the adapter on paper")] = 256,
    targets: Annotated[
        list[str] | None, typer.Option("-t", "--target", help="repeat for several")
    ] = None,
    bits: Annotated[int, typer.Option(help="of the base's weights on paper: 4, 8 or 16")] = 16,
    json: Json = False,
) -> None:
    """What a model has for targets and what it would take, or what an adapter holds; loads no weights."""
    found = (
        adapter_report(folder)
        if is_adapter(folder)
        else model_report(folder, rank=rank, targets=targets, bits=bits)
    )
    show(found, as_json=json)


@app.command()
@reported
def merge(model: Model, adapter: Adapter, out: Out, json: Json = False) -> None:
    """Fold an adapter into its model, and save a plain one that needs no library."""
    show(commands.merge(model, adapter, out), as_json=json)


@app.command()
@reported
def convert(
    model: Model,
    adapter: Adapter,
    out: Out,
    rank: Annotated[
        int | None, typer.Option("-r", "--rank", help="reduce to this rank; exact without it")
    ] = None,
    json: Json = False,
) -> None:
    """Write an adapter as LoRA, for engines that serve LoRA alone."""
    show(commands.convert(model, adapter, out, rank=rank), as_json=json)


@app.command()
@reported
def export(
    model: Model,
    adapter: Adapter,
    out: Out,
    form: Annotated[str, typer.Option(help="merged, constant, input or rows")] = "merged",
    kind: Annotated[str, typer.Option(help="program (.pt2) or onnx")] = "program",
    length: Annotated[int, typer.Option(help="tokens of the example call")] = 16,
    json: Json = False,
) -> None:
    """Write model and adapter as a program that torch alone, or an ONNX runtime, runs."""
    show(commands.export(model, adapter, out, form=form, kind=kind, length=length), as_json=json)


@app.command()
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


@app.command(name="eval")
@reported
def evaluate(
    run: Run,
    data: Annotated[Path, typer.Argument(help="rows with labels, as for training")],
    model: Moved = None,
    columns: Columns = None,
    batch_size: Batch = None,
    json: Json = False,
) -> None:
    """The figures of a finished run over other data."""
    changes = {"model": model, "columns": columns, "batch_size": batch_size}
    show(runs.evaluate(run, data, changes), as_json=json)


@app.command()
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


@app.command()
@reported
def serve(
    model: Model,
    store: Annotated[Path, typer.Argument(help="folder with a folder for each adapter")],
    host: str = "127.0.0.1",
    port: int = 8000,
    capacity: Annotated[int, typer.Option(min=1, help="adapters kept in memory")] = 1024,
    length: Annotated[int, typer.Option(min=1, help="most tokens of a text")] = 64,
) -> None:
    """Serve a classifier and its adapters over HTTP until interrupted."""
    serve_folders(model, store, host=host, port=port, capacity=capacity, length=length)
