"""``vera-fx convert``: an adapter as LoRA."""

from typing import Annotated

import typer

from vera_fx.checkpoint.loading import load_adapter
from vera_fx.checkpoint.lora import lora_errors, to_lora
from vera_fx.cli.arguments import Adapter, Json, Model, Out
from vera_fx.cli.folders import check_new, load
from vera_fx.cli.main import reported
from vera_fx.cli.output import show


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
    check_new(out)
    adapted = load_adapter(load(model), adapter)
    lost = {} if rank is None else lora_errors(adapted, rank)
    to_lora(adapted, out, rank=rank)
    most = max(lost.values(), default=0.0)
    show({"lora": str(out), "rank": rank, "lost at most": most}, as_json=json)
