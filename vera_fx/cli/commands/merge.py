"""``vera-fx merge``: an adapter folded into its model."""

from pathlib import Path

from vera_fx.checkpoint.loading import load_adapter
from vera_fx.cli.arguments import Adapter, Json, Model, Out
from vera_fx.cli.folders import check_new, load
from vera_fx.cli.main import reported
from vera_fx.cli.output import show
from vera_fx.model.adapt import unload

_BESIDE = (
    "tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "preprocessor", "chat",
)  # fmt: skip


@reported
def merge(model: Model, adapter: Adapter, out: Out, json: Json = False) -> None:
    """Fold an adapter into its model, and save a plain one that needs no library."""
    check_new(out)
    merged = unload(load_adapter(load(model), adapter), merge=True)
    merged.save_pretrained(out)
    copied = ", ".join(_copy_tokenizer(model, out)) or None
    show({"merged": str(out), "model": type(merged).__name__, "copied": copied}, as_json=json)


def _copy_tokenizer(source: Path, target: Path) -> list[str]:
    """What goes with a model and is no weight: files of the tokeniser and the processor."""
    found = [path for path in sorted(source.iterdir()) if path.name.startswith(_BESIDE)]
    for path in found:
        (target / path.name).write_bytes(path.read_bytes())
    return [path.name for path in found]
