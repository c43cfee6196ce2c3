"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Model = Annotated[Path, typer.Argument(help="folder of a transformers model")]
Adapter = Annotated[Path, typer.Argument(help="folder of a saved adapter, PEFT's or ours")]
Out = Annotated[Path, typer.Argument(help="folder or file to write; must not exist")]
Run = Annotated[Path, typer.Argument(help="folder of a finished run")]
Moved = Annotated[Path | None, typer.Option("--model", help="where the model is now")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="name=column, repeated")]
Device = Annotated[
    str, typer.Option(help="auto (the accelerator, if there is one), cpu, cuda:0 ...")
]
Threads = Annotated[int, typer.Option(min=0, help="of torch; 0 for torch's own number")]
