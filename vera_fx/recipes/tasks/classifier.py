"""What classifiers of texts and of pictures have in common: labels, loss, figures, predictions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vera_fx.recipes.base_models import Base
from vera_fx.recipes.data import Rows
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.tasks import labels
from vera_fx.recipes.tasks.protocol import Batch, Row, on_device_of


@dataclass(frozen=True)
class Classifier:
    """A `Task`, but for the inputs and the model.

    Attributes:
        recipe: the recipe.
        classes: names of the classes, in the order of the head's outputs.
        processor: what prepares inputs.
    """

    recipe: Recipe
    classes: tuple[str, ...]
    processor: Any

    best: ClassVar[str] = "accuracy"
    figures: ClassVar[Mapping[str, bool]] = labels.FIGURES
    by_tokens: ClassVar[bool] = False
    call: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def columns(cls, there: Sequence[str]) -> tuple[str, ...]:
        """What it trains on, of the columns that are there."""
        return (*cls.asks(there), "label")

    @classmethod
    def asks(cls, there: Sequence[str]) -> tuple[str, ...]:
        """What it predicts from."""
        raise NotImplementedError

    @classmethod
    def from_rows(cls, recipe: Recipe, rows: Rows) -> Self:
        """For data to train on."""
        return cls.from_facts(recipe, {"classes": labels.classes_of(rows)})

    @classmethod
    def from_facts(cls, recipe: Recipe, facts: Mapping[str, Any]) -> Self:
        """For a run that was begun."""
        return cls(recipe, tuple(facts["classes"]), cls.processor_of(recipe))

    @classmethod
    def processor_of(cls, recipe: Recipe) -> Any:
        """What prepares inputs for the recipe's model."""
        raise NotImplementedError

    @staticmethod
    def prepared(rows: Rows) -> Rows:
        """Rows whose labels are names."""
        return labels.with_label_texts(rows)

    def facts(self) -> dict[str, Any]:
        """The classes."""
        return {"classes": list(self.classes)}

    def load(self) -> Base:
        """The base model with a head for the classes."""
        raise NotImplementedError

    def inputs(self, rows: Sequence[Row]) -> Batch:
        """The model's inputs."""
        raise NotImplementedError

    def trained_modules(self, base: Base) -> tuple[str, ...]:
        """The head."""
        return labels.heads_of(base)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The model's inputs, and labels, ``(rows,)``."""
        names = [row["label"] for row in rows]
        return {**self.inputs(rows), "labels": labels.indices(names, self.classes)}

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | int | None) -> Tensor:
        """Cross entropy, a mean over the rows."""
        del count
        answers = batch.pop("labels")
        return F.cross_entropy(model(**batch).logits.float(), answers)

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Losses and predictions."""
        answers = batch.pop("labels")
        return labels.measured(model(**batch).logits, answers)

    def score(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss, accuracy, F1."""
        return labels.figures(found, len(self.classes))

    @torch.no_grad()
    def answers(self, model: nn.Module, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """The likeliest class of every row, with probabilities."""
        logits = model(**on_device_of(model, self.inputs(rows))).logits
        yield from labels.best_classes(logits, self.classes)
