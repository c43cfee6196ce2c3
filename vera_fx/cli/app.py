"""The commands, put together."""

import typer

from vera_fx.cli.commands.bench import bench
from vera_fx.cli.commands.chat import chat
from vera_fx.cli.commands.convert import convert
from vera_fx.cli.commands.doctor import doctor
from vera_fx.cli.commands.evaluate import evaluate
from vera_fx.cli.commands.export import export
from vera_fx.cli.commands.inspect import inspect
from vera_fx.cli.commands.merge import merge
from vera_fx.cli.commands.predict import predict
from vera_fx.cli.commands.serve import serve
from vera_fx.cli.commands.train import train

app = typer.Typer(
    name="vera-fx",
    help="VeRA adapters by a graph pass: train, evaluate, ask, talk to, look at, merge, convert, export, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

for _name, _command in {
    "doctor": doctor,
    "inspect": inspect,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "chat": chat,
    "merge": merge,
    "convert": convert,
    "export": export,
    "bench": bench,
    "serve": serve,
}.items():
    app.command(name=_name)(_command)
