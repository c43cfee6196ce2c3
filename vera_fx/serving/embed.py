"""What an embedder answers: vectors of texts, each by an adapter of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vera_fx.recipes.tasks.pooling import pooled
from vera_fx.serving.batcher import Answer
from vera_fx.serving.classify import tokens


@dataclass(frozen=True)
class Embedded:
    """One text: its vector, of length 1, and how many tokens it had."""

    vector: list[float]
    tokens: int


def embedder(model: Any, tokenizer: Any, *, length: int, pooling: str) -> Answer[Embedded]:
    """Texts and adapters' names -> an `Embedded` for each.

    Args:
        model: an adapted model without a head.
        tokenizer: its tokenizer.
        length: most tokens of a text.
        pooling: ``"mean"``, ``"cls"`` or ``"last"``: how tokens become one vector.
    """

    def embed(texts: Sequence[str], names: Sequence[str]) -> list[Embedded]:
        batch = tokens(model, tokenizer, texts, length)
        with torch.inference_mode():
            states = model(**batch, adapter_names=list(names)).last_hidden_state.float()
            vectors = pooled(states, mask := batch["attention_mask"], pooling)
        return [
            Embedded(vector, count)
            for vector, count in zip(vectors.tolist(), mask.sum(1).tolist(), strict=True)
        ]

    return embed
