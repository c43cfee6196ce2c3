"""A recipe: all that decides what a training run ends in. Read from YAML, from flags, or from both."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import yaml

from vera_fx.errors import ConfigError, listing, nearest, shown
from vera_fx.recipes import checks
from vera_fx.recipes.checks import Check

TASKS = ("classification", "causal-lm", "embeddings", "images")
_PATHS = ("model", "data", "eval_data")
_MISSING = object()


def _field(kind: Any, check: Check, text: str, default: Any = _MISSING, **more: Any) -> Any:
    """A field with its check, and with what its flag takes and says."""
    metadata = {"kind": kind, "check": check, "help": text, **more}
    if default is _MISSING:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how; every field but ``options`` is a flag of ``vera-fx train``.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    task: str = _field(str, checks.one_of(*TASKS), f"{', '.join(TASKS)}")
    model: Path = _field(Path, checks.path, "folder of a transformers model")
    data: Path = _field(Path, checks.path, "JSONL, CSV, TSV or Parquet file, a folder of datasets or of images")  # fmt: skip
    eval_data: Path | None = _field(Path, checks.maybe(checks.path), "data to evaluate on; else a part of data", None)  # fmt: skip
    held_out: float = _field(float, checks.number(0), "share of data, or number of rows, to evaluate on", 0.1)  # fmt: skip
    columns: Mapping[str, str] = _field(list[str], checks.texts_by_text, "what a column is called: text=body; repeat for several", {}, short="--column")  # fmt: skip
    turns: str = _field(str, checks.one_of("all", "last"), "turns of the assistant to learn: all or last", "all")  # fmt: skip
    pooling: str | None = _field(str, checks.maybe(checks.one_of("mean", "cls", "last")), "of embeddings: mean, cls or last; else the model's own, or mean", None)  # fmt: skip
    temperature: float = _field(float, checks.number(0, above=True), "of the loss of embeddings", 0.05)  # fmt: skip
    adapter: str = _field(str, checks.one_of("vera", "dvora"), "vera or dvora", "vera")
    rank: int = _field(int, checks.whole(1), "of the adapter", 256, short="-r")
    targets: tuple[str, ...] | str | None = _field(list[str], checks.maybe(checks.names), "modules to adapt; repeat for several; else the architecture's", None, short="-t")  # fmt: skip
    plan: str = _field(str, checks.one_of("auto", "memory", "factored", "scaled", "merged", "dense"), "how branches are computed", "auto")  # fmt: skip
    options: Mapping[str, Any] = _field(None, checks.mapping, "further fields of the adapter's configuration", {})  # fmt: skip
    epochs: float = _field(float, checks.number(0, above=True), "passes through the data", 3.0)
    steps: int | None = _field(int, checks.maybe(checks.whole(1)), "optimiser's steps, instead of epochs", None)  # fmt: skip
    batch_size: int = _field(int, checks.whole(1), "rows in a batch", 16)
    accumulate: int = _field(int, checks.whole(1), "batches in a step", 1)
    length: int = _field(int, checks.whole(2), "longest row, in tokens; longer ones are cut", 256)
    rate: float = _field(float, checks.number(0, above=True), "learning rate of the vectors", 1e-2)
    head_rate: float | None = _field(float, checks.maybe(checks.number(0)), "learning rate of a trained head; else 0.4 of rate", None)  # fmt: skip
    warmup: float = _field(float, checks.number(0, 1), "share of steps in which rates rise", 0.06)
    schedule: str = _field(str, checks.one_of("linear", "cosine", "constant"), "of rates after that: linear, cosine or constant", "linear")  # fmt: skip
    weight_decay: float = _field(float, checks.number(0), "of AdamW", 0.0)
    clip: float = _field(float, checks.number(0), "largest norm of the gradients; 0 for none", 1.0)
    seed: int = _field(int, checks.whole(0), "of the head, the order and the dropout", 0)
    dtype: str = _field(str, checks.one_of("float32", "bfloat16", "float16", "auto"), "of the base's weights", "float32")  # fmt: skip
    device: str = _field(str, checks.one_of("auto", "cpu"), "auto or cpu", "auto")
    checkpointing: bool = _field(bool, checks.flag, "compute layers again in backward, for memory", False)  # fmt: skip  # noqa: FBT003
    compile: bool = _field(bool, checks.flag, "compile the model", False)
    evaluate_every: int | None = _field(int, checks.maybe(checks.whole(1)), "steps; else once an epoch", None)  # fmt: skip
    save_every: int | None = _field(int, checks.maybe(checks.whole(1)), "steps; else with every evaluation", None)  # fmt: skip
    log_every: int = _field(int, checks.whole(1), "steps", 10)
    patience: int | None = _field(int, checks.maybe(checks.whole(1)), "evaluations without a better one after which to stop", None)  # fmt: skip
    metric: str | None = _field(str, checks.maybe(lambda _, value: str(value)), "that is to be best; else the task's", None)  # fmt: skip
    tensorboard: bool = _field(bool, checks.flag, "write figures for TensorBoard", True)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = entry.metadata["check"](entry.name, getattr(self, entry.name))
            object.__setattr__(self, entry.name, value)

    @classmethod
    def read(cls, file: Path | None, flags: Mapping[str, Any]) -> Self:
        """A recipe from a YAML file, flags, or both; flags win.

        Paths in the file are relative to its folder.

        Raises:
            ConfigError: the file cannot be read, names what no recipe has, or a value is wrong.
        """
        values = {} if file is None else _from_file(file)
        values |= {name: value for name, value in flags.items() if value is not None}
        known = {entry.name: entry for entry in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"a recipe has no {shown(name)}{nearest(str(name), known)}")
        missing = [name for name in ("task", "model", "data") if values.get(name) is None]
        if missing:
            raise ConfigError(
                f"a recipe needs {listing(missing)}; give them as flags (--{missing[0]}) or in a "
                "YAML file (--recipe)"
            )
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """The fields as YAML and JSON know them."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What another recipe's `values` say otherwise, a text for each field."""
        mine = self.values()
        return [
            f"{name} was {shown(other.get(name))} and is {shown(value)}"
            for name, value in mine.items()
            if other.get(name) != value
        ]


def _from_file(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the recipe {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the recipe {file} is no mapping of names to values")
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in _PATHS:
        if isinstance(found.get(name), str):
            found[name] = file.absolute().parent / Path(found[name]).expanduser()
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
