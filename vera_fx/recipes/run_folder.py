"""A run's folder: its recipe, what it learned from its data, its checkpoints and its results.

It is laid out as::

    recipe.yaml     the recipe, whole
    run.json        what tells model and data from others, and the task's facts
    checkpoints/    while it trains
    tensorboard/    figures, for TensorBoard
    adapter/        the adapter, in PEFT's layout
    metrics.json    the end: what the run came to
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vera_fx.disk.files import make_folder, moved_into
from vera_fx.disk.locks import HeldError, locked
from vera_fx.errors import ConfigError
from vera_fx.recipes.checkpoints import steps_of
from vera_fx.recipes.data import fingerprint
from vera_fx.recipes.recipe import Recipe

_RECIPE, _RUN, _METRICS = "recipe.yaml", "run.json", "metrics.json"
_PATIENCE = 1.0


@dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Attributes:
        path: where it is.
    """

    path: Path

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Where Trainer keeps its checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Where figures are written."""
        return self.path / "tensorboard"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block no other process trains in this folder.

        Raises:
            ConfigError: one does, or the folder is no place for a run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; a run needs a folder")
        is_run = (self.path / _RECIPE).is_file()
        if self.path.is_dir() and not is_run and any(self._others()):
            raise ConfigError(
                f"{self.path} holds other things than a run; give a new folder, or that of a run to go on"
            )
        make_folder(self.path)
        try:
            with locked(self.path / ".vera_fx-train.lock", patience=_PATIENCE):
                yield
        except HeldError as error:
            raise ConfigError(
                f"another process trains in {self.path}; wait for it, or end it: {error}"
            ) from error

    def _others(self) -> Iterator[Path]:
        return (entry for entry in self.path.iterdir() if not entry.name.startswith("."))

    def begin(self, recipe: Recipe) -> None:
        """Write the recipe, or compare it with that of the run that is there.

        What has no checkpoint yet is no run: whoever had to correct a recipe may give it again.

        Raises:
            ConfigError: the run that is there has another recipe.
        """
        if not self._has_run():
            (self.path / _RUN).unlink(missing_ok=True)
            self._write(_RECIPE, yaml.safe_dump(recipe.values(), sort_keys=False))
            return
        changed = recipe.differences(self._values())
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another recipe: {'; '.join(changed)}. Give that recipe to "
                "go on with it, or a new folder"
            )

    def _has_run(self) -> bool:
        trained = (self.path / _METRICS).is_file() or bool(steps_of(self.checkpoints))
        return trained and (self.path / _RECIPE).is_file()

    def recipe(self) -> Recipe:
        """The run's recipe.

        Raises:
            ConfigError: there is no run, or its recipe was damaged.
        """
        if not (self.path / _RECIPE).is_file():
            raise ConfigError(f"{self.path} is no run: vera-fx train writes a {_RECIPE} there")
        return Recipe.read(None, self._values())

    def _values(self) -> dict[str, Any]:
        file = self.path / _RECIPE
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{file} is no recipe")
        return values

    def facts(self) -> dict[str, Any] | None:
        """What the run's task learned from its data; None before it did.

        Raises:
            ConfigError: the file was damaged.
        """
        return None if (found := self._json(_RUN)) is None else found["facts"]

    def check_sources(self, recipe: Recipe) -> None:
        """Refuse to go on with other data or another model than the run began with.

        Raises:
            ConfigError: naming which.
        """
        found = self._json(_RUN)
        for name, known in (found or {}).get("sources", {}).items():
            if known != _sources(recipe).get(name):
                raise ConfigError(
                    f"{name} ({getattr(recipe, name)}) is not what this run began with; put that back, "
                    "or train in a new folder"
                )

    def learn(self, recipe: Recipe, facts: Mapping[str, Any]) -> None:
        """Note the task's facts, and what model and data are."""
        self._write(_RUN, json.dumps({"facts": facts, "sources": _sources(recipe)}, indent=1))

    def metrics(self) -> dict[str, Any] | None:
        """What the run came to; None while it has not ended."""
        return self._json(_METRICS)

    def end(self, metrics: Mapping[str, Any]) -> None:
        """Say what the run came to."""
        self._write(_METRICS, json.dumps(metrics, indent=1))

    def _json(self, name: str) -> dict[str, Any] | None:
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is damaged: {error}") from error

    def _write(self, name: str, text: str) -> None:
        with moved_into(self.path) as aside:
            (aside / name).write_text(text, encoding="utf-8")


def _sources(recipe: Recipe) -> dict[str, str]:
    paths = {"model": recipe.model, "data": recipe.data, "eval_data": recipe.eval_data}
    return {name: fingerprint(path) for name, path in paths.items() if path is not None}
