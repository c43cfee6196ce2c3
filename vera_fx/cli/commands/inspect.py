"""``vera-fx inspect``: what a folder holds, without its weights."""

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import vera_fx
from vera_fx.base.modules import base_modules
from vera_fx.checkpoint.saved import is_saved, open_saved
from vera_fx.cli.arguments import Json
from vera_fx.cli.folders import on_paper
from vera_fx.cli.main import reported
from vera_fx.cli.output import show
from vera_fx.errors import TargetError
from vera_fx.model.on_paper import memory_on_paper
from vera_fx.products.kinds import known_kind


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


def is_adapter(folder: Path) -> bool:
    """True for the folder of a saved adapter."""
    return is_saved(folder) or (folder / "adapter_config.json").is_file()


def adapter_report(folder: Path) -> dict[str, Any]:
    """What an adapter holds.

    Raises:
        CheckpointError: the files are missing or damaged.
    """
    with open_saved(folder) as saved:
        entries = saved.weights.entries
        shapes = {name: tuple(entry.shape) for name, entry in entries.items()}
        config = saved.config
        return {
            "adapter": str(folder),
            "kind": type(config).__name__.removesuffix("Config"),
            "base": saved.origin.get("base_model_name_or_path") or None,
            "rank": config.r,
            "targets": config.target_modules
            if isinstance(config.target_modules, str)
            else ", ".join(sorted(config.target_modules or ())),
            "tensors": len(shapes),
            "numbers": sum(map(math.prod, shapes.values())),
            "dtypes": ", ".join(sorted({str(entry.dtype) for entry in entries.values()})),
            "changed since it was saved": ", ".join(saved.changed) or None,
        }


def model_report(
    folder: Path, *, rank: int, targets: list[str] | None, bits: int
) -> dict[str, Any]:
    """What could be adapted in a model, and what an adapter of that rank would take.

    Raises:
        ConfigError: the folder holds no model that transformers knows.
        TargetError: the targets are not there, or none are given and none are known.
    """
    model = on_paper(folder)
    config = vera_fx.VeraConfig(r=rank, target_modules=targets)
    try:
        found = memory_on_paper(model, config, bits=bits)
    except TargetError as error:
        if targets is not None:
            raise
        memory: dict[str, Any] = {"on paper": str(error).splitlines()[0]}
    else:
        memory = {"on paper, MiB": str(found), "trainable": found.vectors // 4}
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "linear modules": linear_modules(model),
        "rank": rank,
        **memory,
    }


def linear_modules(model: nn.Module) -> list[dict[str, Any]]:
    """The modules that can be targets, by the last word of their paths and their sizes."""
    counts: Counter[tuple[str, int, int]] = Counter()
    for path, module in base_modules(model).items():
        kind = known_kind(module)
        if kind is not None and kind.refusal(module) is None:
            counts[path.rpartition(".")[2], *kind.features(module)] += 1
    return [
        {"name": name, "in": inside, "out": out, "count": count}
        for (name, inside, out), count in counts.items()
    ]
