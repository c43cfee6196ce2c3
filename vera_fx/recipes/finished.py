"""What is done with a finished run: figures over other rows, and predictions."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

import vera_fx
from vera_fx.errors import ConfigError
from vera_fx.recipes import data
from vera_fx.recipes.checks import whole
from vera_fx.recipes.data import EVAL, TRAIN
from vera_fx.recipes.evaluation import batches, evaluate
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.run_folder import RunFolder
from vera_fx.recipes.tasks.causal_lm import CausalLM
from vera_fx.recipes.tasks.kinds import kind_of
from vera_fx.recipes.tasks.protocol import Task
from vera_fx.recipes.train import canonical, for_task


@dataclass(frozen=True)
class Finished:
    """A run's model with its adapter, ready for calls."""

    recipe: Recipe
    task: Task
    model: Any

    @classmethod
    def load(cls, path: Path, changes: Mapping[str, Any]) -> Self:
        """Load a run's adapter onto its model.

        Args:
            path: the run's folder.
            changes: what of its recipe is otherwise now: where the model is, the device.

        Raises:
            ConfigError: there is no run, or it has not ended.
            CheckpointError: the adapter was damaged, or is none of this model.
        """
        folder = RunFolder(path.absolute())
        recipe = folder.recipe()
        facts = folder.facts()
        if facts is None or folder.metrics() is None:
            raise ConfigError(
                f"the run in {path} has not ended; go on with vera-fx train and its recipe"
            )
        given = {name: value for name, value in changes.items() if value not in (None, {}, [])}
        recipe = dataclasses.replace(recipe, **given)
        task = kind_of(recipe).from_facts(recipe, facts)
        model = vera_fx.load_adapter(task.load().model, folder.adapter, plan=recipe.plan)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if recipe.device == "auto" and accelerator is not None:
            model.to(accelerator)
        return cls(recipe, task, model.eval())

    def evaluate(self, path: Path) -> dict[str, Any]:
        """The task's figures over the rows of a file or folder.

        Raises:
            ConfigError: they cannot be used.
        """
        found = data.read(path)
        rows = for_task(self.recipe, found.get(EVAL, found[TRAIN]))
        figures = evaluate(self.model, self.task, rows, self.recipe.batch_size)
        return {"task": self.recipe.task, "rows": len(rows), **figures}

    def predict(self, path: Path) -> Iterator[dict[str, Any]]:
        """An answer for every row of a file or folder, in their order.

        Raises:
            ConfigError: they cannot be used.
        """
        found = data.read(path)
        rows = found.get(EVAL, found[TRAIN])
        wanted = self.task.asks(canonical(self.recipe.columns, rows.column_names))
        return self.answers(data.with_columns(rows, wanted, self.recipe.columns))

    def with_new_tokens(self, count: int) -> Self:
        """The same with answers of at most so many tokens.

        Raises:
            ConfigError: the task generates none, or the number is none of tokens.
        """
        if not isinstance(self.task, CausalLM):
            raise ConfigError(f"a run on {self.recipe.task} generates no tokens")
        count = whole(1)("new_tokens", count)
        return dataclasses.replace(self, task=dataclasses.replace(self.task, new_tokens=count))

    def answers(self, rows: Any) -> Iterator[dict[str, Any]]:
        """An answer for every row."""
        for some in batches(rows, self.recipe.batch_size):
            yield from self.task.answers(self.model, some)

    def ask(self, texts: list[str]) -> Iterator[dict[str, Any]]:
        """An answer for every text.

        Raises:
            ConfigError: the task is not one of texts.
        """
        return self.answers([self.task.row_of(text) for text in texts])
