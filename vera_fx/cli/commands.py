"""Commands that write: from a model folder and an adapter folder to something that leaves."""

from pathlib import Path
from typing import Any

import torch

from vera_fx.checkpoint.loading import load_adapter
from vera_fx.checkpoint.lora import lora_errors, to_lora
from vera_fx.cli.folders import check_new, load
from vera_fx.errors import ConfigError
from vera_fx.export.files import save_program
from vera_fx.export.onnx import export_onnx
from vera_fx.export.program import export_program
from vera_fx.model.adapt import unload


def merge(model: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """A plain model with the adapter in its weights, and the tokeniser's files beside it."""
    check_new(out)
    merged = unload(load_adapter(load(model), adapter), merge=True)
    merged.save_pretrained(out)
    copied = _copy_tokenizer(model, out)
    return {"merged": str(out), "model": type(merged).__name__, "copied": ", ".join(copied) or None}


def _copy_tokenizer(source: Path, target: Path) -> list[str]:
    """What goes with a model and is no weight: files of the tokeniser and the processor."""
    names = (
        "tokenizer",
        "special_tokens",
        "vocab",
        "merges",
        "added_tokens",
        "preprocessor",
        "chat",
    )
    found = [path for path in sorted(source.iterdir()) if path.name.startswith(names)]
    for path in found:
        (target / path.name).write_bytes(path.read_bytes())
    return [path.name for path in found]


def convert(model: Path, adapter: Path, out: Path, *, rank: int | None) -> dict[str, Any]:
    """The adapter as LoRA; with a rank, the largest share of an update that is lost."""
    check_new(out)
    adapted = load_adapter(load(model), adapter)
    lost = {} if rank is None else lora_errors(adapted, rank)
    to_lora(adapted, out, rank=rank)
    return {"lora": str(out), "rank": rank, "lost at most": max(lost.values(), default=0.0)}


def export(
    model: Path, adapter: Path, out: Path, *, form: str, kind: str, length: int
) -> dict[str, Any]:
    """A program or an ONNX file for calls with ``input_ids`` and ``attention_mask``."""
    check_new(out)
    if kind not in {"program", "onnx"}:
        raise ConfigError(f"kind is program or onnx, not {kind!r}")
    adapted = load_adapter(load(model), adapter)
    vocabulary = getattr(adapted.config.get_text_config(), "vocab_size", None)
    if vocabulary is None or adapted.main_input_name != "input_ids":
        raise ConfigError(
            f"{type(adapted).__name__} takes {adapted.main_input_name}; the command line exports models of "
            "text alone, vera_fx.export_program any"
        )
    ids = torch.arange(2 * length).reshape(2, length) % vocabulary
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "onnx":
        export_onnx(adapted, out, kwargs=example, form=form)
    else:
        save_program(export_program(adapted, kwargs=example, form=form), out)
    return {"written": str(out), "form": form, "bytes": out.stat().st_size}
