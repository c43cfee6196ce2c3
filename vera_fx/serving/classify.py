"""What a classifier answers: probabilities for texts, each by an adapter of its own."""

from collections.abc import Sequence
from typing import Any

import torch

import vera_fx
from vera_fx.serving.batcher import Answer, Classify


def classifier(model: Any, tokenizer: Any, *, length: int = 64, mixed: bool = True) -> Classify:
    """Texts and adapters' names -> probabilities, ``n`` lists of as many numbers as labels.

    Args:
        model: an adapted model.
        tokenizer: its tokenizer.
        length: most tokens of a text.
        mixed: False to let the active adapter judge, whatever the names.
    """

    def classify(texts: Sequence[str], names: Sequence[str]) -> list[list[float]]:
        batch = tokens(model, tokenizer, texts, length)
        rows = {"adapter_names": list(names)} if mixed else {}
        with torch.inference_mode():
            return model(**batch, **rows).logits.softmax(-1).tolist()

    return classify


def tokens(model: Any, tokenizer: Any, texts: Sequence[str], length: int) -> Any:
    """Token ids and their mask where the model is, ``(texts, tokens)``."""
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    return batch.to(next(model.parameters()).device)


def warm_up(answer: Answer[Any], store: vera_fx.AdapterStore) -> None:
    """Capture before the first request; one row is a signature of its own."""
    names = store.names()
    if names:
        for rows in (1, 2):
            answer(["warm up"] * rows, names[:1] * rows)
