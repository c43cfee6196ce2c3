"""A model's folder and a store's folder as something that answers: a classifier or an embedder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import vera_fx
from vera_fx.base.positions import room_of
from vera_fx.checkpoint.saved import is_saved
from vera_fx.config import check_choice
from vera_fx.errors import ConfigError, first_line
from vera_fx.recipes.base_models import check_folder, load_tokenizer
from vera_fx.recipes.tasks.pooling import POOLINGS, pooling_of
from vera_fx.serving.batcher import Answer
from vera_fx.serving.classify import classifier
from vera_fx.serving.embed import embedder
from vera_fx.serving.shared_store import SharedStore

LENGTH = 256
_KIND = "first of the store"  # the adapter that gives the model its branches
_KNOWN_MODULES = {"Transformer", "Pooling", "Normalize"}


@dataclass(frozen=True)
class Served:
    """What answers, over a store.

    Attributes:
        answer: texts and adapters' names -> scores, or `vera_fx.serving.embed.Embedded`.
        store: the adapters.
        labels: the names of the scores; none of an embedder.
        facts: what was chosen, by name.
    """

    answer: Answer[Any]
    store: vera_fx.AdapterStore
    labels: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


def open_served(
    folder: Path,
    store: Path,
    *,
    capacity: int = 1024,
    length: int | None = None,
    pooling: str | None = None,
    device: torch.device | str = "cpu",
    shared: bool = False,
) -> Served:
    """Load a model and attach the store.

    Args:
        folder: of the model: one with a head for classes of texts, or one without a head.
        store: a folder with a folder for each adapter; the first by name gives the model its branches.
        capacity: adapters kept in memory.
        length: most tokens of a text; None for 256, or what the model takes where that is less.
        pooling: of an embedder; None for what its folder says.
        device: where the model is to be.
        shared: whether other processes replace and delete adapters in the store's folder.

    Raises:
        ConfigError: the model is neither, the store holds no adapter to begin with, or a choice does
            not fit the model.
        CheckpointError: the first adapter does not fit the model.
    """
    first = _first(store)
    pooling = _pooling(folder, pooling)
    tokenizer, base = load_tokenizer(folder), _load(folder, embeds=pooling is not None)
    length = _length(length, tokenizer, base)
    facts = {"model": type(base).__name__, "device": str(device), "length": length}
    vera_fx.load_adapter(base.eval().to(device), first, adapter_name=_KIND)
    kind = SharedStore if shared else vera_fx.AdapterStore
    adapters = kind(base, store, capacity=capacity)
    if pooling is not None:
        answer = embedder(base, tokenizer, length=length, pooling=pooling)
        return Served(answer, adapters, (), {**facts, "vectors by": pooling})
    labels = tuple(base.config.id2label[index] for index in range(base.config.num_labels))
    answer = classifier(base, tokenizer, length=length)
    return Served(answer, adapters, labels, {**facts, "classes": len(labels)})


def _pooling(folder: Path, wanted: str | None) -> str | None:
    """How the tokens of an embedder become a vector; None for a classifier."""
    if wanted is not None:
        check_choice("pooling", wanted, POOLINGS)
    if not _embeds(check_folder(folder)):
        if wanted is not None:
            raise ConfigError(f"pooling is of embedders, and {str(folder)!r} holds a classifier")
        return None
    return wanted or pooling_of(folder)


def _embeds(folder: Path) -> bool:
    """Whether a folder holds an embedder, as its configuration says; else it is a classifier."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = next(iter(config.get("architectures") or ()), "model of no class")
    if name.endswith("ForSequenceClassification"):
        return False
    if (folder / "modules.json").is_file():
        _check_modules(folder / "modules.json")
        return True
    if name.endswith("Model"):
        return True
    raise ConfigError(
        f"{str(folder)!r} is a {name}; classifiers of texts (...ForSequenceClassification) and embedders "
        "(a model without a head, or a folder of sentence-transformers) are served"
    )


def _check_modules(file: Path) -> None:
    """Refuse what would make other vectors than sentence-transformers does."""
    try:
        kinds = [module["type"].rpartition(".")[2] for module in json.loads(file.read_text())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} is no list of sentence-transformers' modules: {error}"
        ) from error
    others = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if others:
        raise ConfigError(f"{file} asks for {', '.join(others)} behind the pooling: not served")


def _load(folder: Path, *, embeds: bool) -> Any:
    import transformers

    kind = transformers.AutoModel if embeds else transformers.AutoModelForSequenceClassification
    try:
        model = kind.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"{str(folder)!r} cannot be loaded: {first_line(error)}") from error
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(model).__name__} takes more or other than the tokens of one text: not served"
        )
    return model


def _length(wanted: int | None, tokenizer: Any, model: Any) -> int:
    """Most tokens of a text: what was asked for, or 256, within what the model has positions for.

    What a tokeniser says is a default, no limit: in many folders it is wrong.
    """
    table, most = room_of(model), getattr(model.config, "max_position_embeddings", None)
    most = table[1] if table else most
    if wanted is None:
        return min(LENGTH, tokenizer.model_max_length, most or LENGTH)
    if most is not None and wanted > most:
        raise ConfigError(f"length is {wanted}, and {type(model).__name__} takes {most} tokens")
    return wanted


def _first(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if is_saved(path)) if folder.is_dir() else []
    if not found:
        raise ConfigError(
            f"{str(folder)!r} holds no adapter; give a folder with a folder for each adapter, as "
            "save_adapter writes it"
        )
    return found[0]
