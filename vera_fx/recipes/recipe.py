"""A recipe: all that decides what a training run ends in. Read from YAML, from flags, or from both."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import yaml

from vera_fx.errors import ConfigError, listing, nearest, shown
from vera_fx.recipes.recipe_fields import SPECS

_PATHS = ("model", "data", "eval_data")


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how; what each field may be is in `vera_fx.recipes.recipe_fields`.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    task: str
    model: Path
    data: Path
    eval_data: Path | None = None
    held_out: float = 0.1
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    turns: str = "all"
    pooling: str | None = None
    temperature: float = 0.05
    adapter: str = "vera"
    rank: int = 256
    targets: tuple[str, ...] | str | None = None
    plan: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    length: int = 256
    rate: float = 1e-2
    head_rate: float | None = None
    warmup: float = 0.06
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    checkpointing: bool = False
    compile: bool = False
    evaluate_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    patience: int | None = None
    metric: str | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = SPECS[entry.name].check(entry.name, getattr(self, entry.name))
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
