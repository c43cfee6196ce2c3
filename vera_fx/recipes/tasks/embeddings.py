"""Embeddings: pairs of texts that belong together, told from the other pairs of their batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vera_fx.errors import ConfigError
from vera_fx.recipes.base_models import Base, load_base, load_tokenizer
from vera_fx.recipes.data import Rows
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.tasks.lengths import length_of
from vera_fx.recipes.tasks.padding import Padding
from vera_fx.recipes.tasks.pooling import pooled, pooling_of
from vera_fx.recipes.tasks.protocol import Batch, Row, on_device_of

_CHUNK = 1024


@dataclass(frozen=True)
class Embeddings:
    """A `Task`; its columns are ``anchor`` and ``positive``.

    Attributes:
        pooling: ``"mean"``, ``"cls"`` or ``"last"``: how tokens become one vector.
    """

    recipe: Recipe
    padding: Padding
    pooling: str

    task_type: ClassVar[str | None] = "FEATURE_EXTRACTION"
    best: ClassVar[str] = "accuracy"
    figures: ClassVar[Mapping[str, bool]] = {"loss": False, "accuracy": True, "mrr": True}
    by_tokens: ClassVar[bool] = False
    call: ClassVar[Mapping[str, Any]] = {}

    @staticmethod
    def columns(there: Sequence[str]) -> tuple[str, ...]:
        """What it trains on."""
        del there
        return ("anchor", "positive")

    @staticmethod
    def prepared(rows: Rows) -> Rows:
        """The rows as they are."""
        return rows

    @classmethod
    def from_rows(cls, recipe: Recipe, rows: Rows) -> Self:
        """For data to train on.

        Raises:
            ConfigError: batches of one row, which hold nothing to tell a pair from.
        """
        if recipe.batch_size < 2 or len(rows) < 2:  # noqa: PLR2004
            raise ConfigError(
                "embeddings learn by telling a pair from the others of its batch; give batch_size of at "
                "least 2, and more than one row"
            )
        return cls.from_facts(recipe, {})

    @classmethod
    def from_facts(cls, recipe: Recipe, facts: Mapping[str, Any]) -> Self:
        """For a run that was begun."""
        pooling = facts.get("pooling") or recipe.pooling or pooling_of(recipe.model)
        padding = Padding(load_tokenizer(recipe.model), length_of(recipe))
        return cls(recipe, padding, pooling)

    def facts(self) -> dict[str, Any]:
        """The pooling."""
        return {"pooling": self.pooling}

    def load(self) -> Base:
        """The encoder."""
        return load_base(self.recipe, "AutoModel")

    def trained_modules(self, base: Base) -> tuple[str, ...]:
        """None: what has no values, such as a pooler, is not part of the embeddings."""
        del base
        return ()

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Token ids and mask, ``(2 * rows, length)``: all anchors, then all positives."""
        return self.padding([str(row[name]) for name in ("anchor", "positive") for row in rows])

    def embed(self, model: nn.Module, batch: Batch) -> Tensor:
        """Vectors of length 1, ``(texts, width)``."""
        states = model(**batch).last_hidden_state.float()
        return pooled(states, batch["attention_mask"], self.pooling)

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | int | None) -> Tensor:
        """InfoNCE (arXiv 1807.03748) over the batch: a mean over its pairs."""
        del count
        anchors, positives = self.embed(model, batch).chunk(2)
        likeness = anchors @ positives.T / self.recipe.temperature
        return F.cross_entropy(likeness, torch.arange(len(likeness), device=likeness.device))

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The vectors themselves."""
        anchors, positives = self.embed(model, batch).chunk(2)
        return {"anchor": anchors, "positive": positives}

    def score(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Retrieval among the positives of all rows: how often the right one is first, and its rank."""
        losses, ranks = list[Tensor](), list[Tensor]()
        for start in range(0, len(found["anchor"]), _CHUNK):
            likeness = found["anchor"][start : start + _CHUNK] @ found["positive"].T
            right = torch.arange(start, start + len(likeness))
            losses.append(
                F.cross_entropy(likeness / self.recipe.temperature, right, reduction="none")
            )
            own = likeness.gather(1, right[:, None])
            # A tie counts as lost, so that equal vectors win nothing.
            ranks.append((likeness >= own).sum(1))
        rank = torch.cat(ranks).double()
        return {
            "loss": torch.cat(losses).double().mean().item(),
            "accuracy": (rank == 1).double().mean().item(),
            "mrr": (1 / rank).mean().item(),
        }

    @torch.no_grad()
    def answers(self, model: nn.Module, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """The vector of each text."""
        batch = on_device_of(model, self.padding([str(row["text"]) for row in rows]))
        for vector in self.embed(model, batch).tolist():
            yield {"embedding": vector}

    def row_of(self, text: str) -> Row:
        """The text."""
        return {"text": text}

    def asks(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The text."""
        del columns
        return ("text",)
