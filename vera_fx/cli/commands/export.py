"""``vera-fx export``: model and adapter as a program."""

from typing import Annotated, Any

import torch
import typer

from vera_fx.checkpoint.loading import load_adapter
from vera_fx.cli.arguments import Adapter, Json, Model, Out
from vera_fx.cli.folders import check_new, load
from vera_fx.cli.main import reported
from vera_fx.cli.output import show
from vera_fx.errors import ConfigError
from vera_fx.export.files import save_program
from vera_fx.export.onnx import export_onnx
from vera_fx.export.program import export_program


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
    check_new(out)
    if kind not in {"program", "onnx"}:
        raise ConfigError(f"kind is program or onnx, not {kind!r}")
    adapted = load_adapter(load(model), adapter)
    example = _example(adapted, length)
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "onnx":
        export_onnx(adapted, out, kwargs=example, form=form)
    else:
        save_program(export_program(adapted, kwargs=example, form=form), out)
    show({"written": str(out), "form": form, "bytes": out.stat().st_size}, as_json=json)


def _example(adapted: Any, length: int) -> dict[str, torch.Tensor]:
    """A call with ``input_ids`` and ``attention_mask``, ``(2, length)``."""
    vocabulary = getattr(adapted.config.get_text_config(), "vocab_size", None)
    if vocabulary is None or adapted.main_input_name != "input_ids":
        raise ConfigError(
            f"{type(adapted).__name__} takes {adapted.main_input_name}; the command line exports models of "
            "text alone, vera_fx.export_program any"
        )
    ids = torch.arange(2 * length).reshape(2, length) % vocabulary
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
