"""What a task is: the seam between the trainer and what is trained."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from vera_fx.recipes.base_models import Base
from vera_fx.recipes.data import Rows
from vera_fx.recipes.recipe import Recipe

Batch = dict[str, Tensor]
Row = Mapping[str, Any]


class Task(Protocol):
    """Made for one recipe and one run; immutable.

    Attributes:
        task_type: PEFT's word for it, or None.
        best: the figure by which one evaluation is better than another.
        figures: all figures, and whether more is better.
        by_tokens: whether the loss is a mean over the labels of all batches of a step; else it is one
            over rows, and the step takes the mean of its batches'.
        call: what the model is called with beside a batch.
    """

    task_type: ClassVar[str | None]
    best: ClassVar[str]
    figures: ClassVar[Mapping[str, bool]]
    by_tokens: ClassVar[bool]
    call: ClassVar[Mapping[str, Any]]

    def facts(self) -> dict[str, Any]:
        """What was learned from the data, as JSON; with the recipe it makes the task again."""
        ...

    def load(self) -> Base:
        """The base model, with a head for the task."""
        ...

    def trained_modules(self, base: Base) -> tuple[str, ...]:
        """The modules that train in full beside the adapter's vectors."""
        ...

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The model's inputs for some rows, and ``"labels"`` if the task has any."""
        ...

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | int | None) -> Tensor:
        """The loss of a batch; ``count`` is the number of labels in the step if `by_tokens`."""
        ...

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What figures are made of, row by row: ``(rows, ...)`` each."""
        ...

    def score(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """The `figures` of all rows, from what `measure` gave for their batches."""
        ...

    def answers(self, model: nn.Module, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """What the model says to rows without labels, as JSON, in their order."""
        ...

    def row_of(self, text: str) -> Row:
        """A row for `answers` that asks one text.

        Raises:
            ConfigError: the task is not one of texts.
        """
        ...

    def asks(self, there: Sequence[str], /) -> tuple[str, ...]:
        """The columns that `answers` needs, of those that are there."""
        ...


class TaskKind(Protocol):
    """How a task is made: of data to train on, or of the facts of a run that was begun."""

    def columns(self, there: Sequence[str], /) -> tuple[str, ...]:
        """What it trains on, of the columns that are there."""
        ...

    def prepared(self, rows: Rows, /) -> Rows:
        """Rows with these columns, as its batches take them."""
        ...

    def from_rows(self, recipe: Recipe, rows: Rows, /) -> Task:
        """For data to train on."""
        ...

    def from_facts(self, recipe: Recipe, facts: Mapping[str, Any], /) -> Task:
        """For a run that was begun."""
        ...


def on_device_of(model: nn.Module, batch: Batch) -> Batch:
    """A batch where the model's parameters are."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
