"""Causal language models: the next token, of answers alone where there are questions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vera_fx.base.positions import room_of
from vera_fx.errors import ConfigError
from vera_fx.recipes.base_models import Base, load_base, load_tokenizer
from vera_fx.recipes.data import Rows
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.tasks.chat import IGNORED, Chat, form_of
from vera_fx.recipes.tasks.lengths import length_of
from vera_fx.recipes.tasks.padding import Padding
from vera_fx.recipes.tasks.protocol import Batch, Row, on_device_of


@dataclass(frozen=True)
class CausalLM:
    """A `Task`.

    Attributes:
        form: the columns that it was trained on.
        new_tokens: the most that an answer has.
    """

    recipe: Recipe
    chat: Chat
    padding: Padding
    form: tuple[str, ...]
    new_tokens: int = 64

    task_type: ClassVar[str | None] = "CAUSAL_LM"
    best: ClassVar[str] = "loss"
    figures: ClassVar[Mapping[str, bool]] = {"loss": False, "perplexity": False, "accuracy": True}
    by_tokens: ClassVar[bool] = True
    call: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    @staticmethod
    def columns(there: Sequence[str]) -> tuple[str, ...]:
        """What it trains on, of the columns that are there."""
        return form_of(there)

    @staticmethod
    def prepared(rows: Rows) -> Rows:
        """The rows as they are."""
        return rows

    @classmethod
    def from_rows(cls, recipe: Recipe, rows: Rows) -> Self:
        """For data to train on; reads all of it, so that no row fails in the middle of a run.

        Raises:
            ConfigError: a row has nothing to learn.
        """
        made = cls.from_facts(recipe, {"form": form_of(rows.column_names)})
        for number, row in enumerate(rows):
            if set(made.chat.tokens(row)[1]) == {IGNORED}:
                raise ConfigError(
                    f"row {number + 1} of those to train on has nothing to learn within {made.chat.length} "
                    "tokens: its answer is empty, or its question takes them all; give a larger length, "
                    "or leave it out"
                )
        return made

    @classmethod
    def from_facts(cls, recipe: Recipe, facts: Mapping[str, Any]) -> Self:
        """For a run that was begun."""
        tokenizer = load_tokenizer(recipe.model)
        length = length_of(recipe)
        chat = Chat(tokenizer, length, recipe.turns)
        return cls(recipe, chat, Padding(tokenizer, length), tuple(facts["form"]))

    def facts(self) -> dict[str, Any]:
        """The form of its rows."""
        return {"form": list(self.form)}

    def load(self) -> Base:
        """The language model."""
        return load_base(self.recipe, "AutoModelForCausalLM")

    def trained_modules(self, base: Base) -> tuple[str, ...]:
        """None, in a model that is whole.

        Raises:
            ConfigError: the folder holds a model without an output head.
        """
        if base.fresh:
            raise ConfigError(
                f"{self.recipe.model} has no values for {', '.join(base.fresh)}: it is no whole causal "
                "language model"
            )
        return ()

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Token ids, their mask and labels, ``(rows, length)``."""
        ids, labels = zip(*map(self.chat.tokens, rows), strict=True)
        return {
            "input_ids": self.padding.ids(ids, self.chat.tokenizer.pad_token_id),
            "attention_mask": self.padding.ids([[1] * len(row) for row in ids], 0),
            "labels": self.padding.ids(labels, IGNORED),
        }

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | int | None) -> Tensor:
        """Cross entropy, a mean over the tokens to learn of a whole step."""
        losses, labels, _ = self._losses(model, batch)
        return losses.sum() / ((labels != IGNORED).sum() if count is None else count)

    def _losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, labels and whether they were likeliest, ``(rows, length - 1)``."""
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, **self.call).logits[:, :-1].float()
        losses = F.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return losses, labels, logits.argmax(-1) == labels

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over the tokens of each row."""
        losses, labels, right = self._losses(model, batch)
        return {
            "loss": losses.double().sum(1),
            "right": right.sum(1),
            "tokens": (labels != IGNORED).sum(1),
        }

    def score(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean loss of a token, its exponential, and how many tokens were the likeliest."""
        tokens = found["tokens"].sum().item()
        if not tokens:
            raise ConfigError("the rows to evaluate on have no tokens to learn within the length")
        loss = found["loss"].sum().item() / tokens
        perplexity = math.exp(min(loss, 700.0))
        accuracy = found["right"].sum().item() / tokens
        return {"loss": loss, "perplexity": perplexity, "accuracy": accuracy}

    def row_of(self, text: str) -> Row:
        """What the user says, a prompt, or the beginning of a text."""
        if self.form == ("messages",):
            return {"messages": [{"role": "user", "content": text}]}
        return {self.form[0]: text}

    def asks(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The question: what answers are learned to, or a text to go on with."""
        found = [name for name in ("messages", "prompt", "text") if name in columns]
        return tuple(found[:1]) or form_of(columns)

    @torch.no_grad()
    def answers(self, model: nn.Module, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """The likeliest text after each question, of which the last tokens are read that there is room for.

        Raises:
            ConfigError: the answers alone may be longer than the model has positions for.
        """
        tokenizer = self.chat.tokenizer
        read = self._room_for_questions(model)
        asked = [self.chat.question(row)[-read:] for row in rows]
        batch = {
            "input_ids": self.padding.ids(asked, tokenizer.pad_token_id, left=True),
            "attention_mask": self.padding.ids([[1] * len(row) for row in asked], 0, left=True),
        }
        generator: Any = model
        found = generator.generate(
            **on_device_of(model, batch),
            max_new_tokens=self.new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = found[:, batch["input_ids"].shape[1] :]
        for text in tokenizer.batch_decode(new, skip_special_tokens=True):
            yield {"answer": text}

    def _room_for_questions(self, model: nn.Module) -> int:
        """The most tokens of a question, so that its answer has positions as well."""
        if (room := room_of(model)) is None:
            return self.chat.length
        if self.new_tokens >= room[1]:
            raise ConfigError(
                f"an answer may have {self.new_tokens} tokens, and {type(model).__name__} has positions for "
                f"{room[1]}, the question's among them; give a smaller new_tokens"
            )
        return min(self.chat.length, room[1] - self.new_tokens)
