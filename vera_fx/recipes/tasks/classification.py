"""Classes of texts: columns ``text``, perhaps ``text_pair``, and ``label``."""

from collections.abc import Sequence
from typing import Any, ClassVar

from vera_fx.recipes.base_models import Base, load_base, load_tokenizer
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.tasks.classifier import Classifier
from vera_fx.recipes.tasks.labels import label_fields
from vera_fx.recipes.tasks.lengths import length_of
from vera_fx.recipes.tasks.padding import Padding
from vera_fx.recipes.tasks.protocol import Batch, Row


class Classification(Classifier):
    """A `Task`; a second text in ``text_pair`` goes along where the data has one."""

    task_type: ClassVar[str | None] = "SEQ_CLS"

    @classmethod
    def asks(cls, there: Sequence[str]) -> tuple[str, ...]:
        """The texts."""
        return ("text", "text_pair") if "text_pair" in there else ("text",)

    def row_of(self, text: str) -> Row:
        """The text."""
        return {"text": text}

    @classmethod
    def processor_of(cls, recipe: Recipe) -> Padding:
        """The model's tokeniser."""
        return Padding(load_tokenizer(recipe.model), length_of(recipe))

    def load(self) -> Base:
        """An encoder or decoder with a head for the classes."""
        base = load_base(
            self.recipe, "AutoModelForSequenceClassification", **label_fields(self.classes)
        )
        config: Any = base.model.config
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.processor.tokenizer.pad_token_id
        return base

    def inputs(self, rows: Sequence[Row]) -> Batch:
        """Token ids and their mask, ``(rows, length)``."""
        second = [str(row["text_pair"]) for row in rows] if "text_pair" in rows[0] else None
        return self.processor([str(row["text"]) for row in rows], second)
