"""The commands, and what they take."""

from pathlib import Path
from typing import Annotated

import typer

from vera_fx.cli import commands
from vera_fx.cli.doctor import diagnosis
from vera_fx.cli.inspect import adapter_report, is_adapter, model_report
from vera_fx.cli.main import reported
from vera_fx.cli.output import show

app = typer.Typer(
    name="vera-fx",
    help="VeRA adapters by a graph pass: look at models and adapters, merge, convert and export them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Model = Annotated[Path, typer.Argument(help="folder of a transformers model")]
Adapter = Annotated[Path, typer.Argument(help="folder of a saved adapter, PEFT's or ours")]
Out = Annotated[Path, typer.Argument(help="folder or file to write; must not exist")]


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
