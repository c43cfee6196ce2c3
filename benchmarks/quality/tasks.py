"""Tasks: what is trained on, what decides rates, what is judged at the end, and which base is adapted."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.server.minilm import bundled
from examples.text_data import read_dataset
from vera_fx.training.examples import padding_for

Example = dict[str, Any]
SENTIMENT = Path(__file__).parents[2] / "examples/data/sentiment"
LENGTH, TRAIN, VALIDATION, TEST = 24, 512, 300, 400
"""Most tokens of a sentence, and how many sentences train, decide rates, and judge.

Longer sentences and repeated ones are left out, so that five seeds of everything fit into an hour of one CPU core.
"""

DOMAINS = ("movies", "news", "products", "tweets")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Task:
    """Examples by their use, and the base.

    Attributes:
        name: how results call it.
        train: examples to train on.
        validation: to choose learning rates by.
        test: to judge by; no choice depends on them.
        base: a seed -> the pretrained model under a fresh head drawn from it.
        epochs: times that each example is trained on.
        batch_size: examples of a step.
    """

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    base: Callable[[int], nn.Module]
    epochs: int = 2
    batch_size: int = 8

    def batches(self, seed: int) -> list[list[Example]]:
        """Every step's examples, in order. The same seed gives every method the same steps.

        Batches hold examples of like length, so that little is padding.
        """
        picked = random.Random(seed)
        found: list[list[Example]] = []
        for _ in range(self.epochs):
            mixed = picked.sample(self.train, len(self.train))
            pool = 8 * self.batch_size
            pools = (sorted(mixed[i : i + pool], key=tokens) for i in range(0, len(mixed), pool))
            rows = [row for part in pools for row in part]
            starts = list(range(0, len(rows), self.batch_size))
            picked.shuffle(starts)
            found.extend(rows[i : i + self.batch_size] for i in starts)
        return found


def tokens(example: Example) -> int:
    """How long an example is; images are all of one length."""
    return len(example.get("input_ids", ()))


def collated(rows: list[Example]) -> dict[str, Tensor]:
    """One batch, padded on the right to its longest."""
    return dict(padding_for(0)(rows))


def in_batches(rows: list[Example], size: int = 64) -> Iterator[dict[str, Tensor]]:
    """All rows in their order, as batches."""
    for at in range(0, len(rows), size):
        yield collated(rows[at : at + size])


@cache
def sentiment(domain: str) -> Task:
    """Positive or negative sentences of one domain, and MiniLM."""
    options: dict[str, Any] = {"text": "text", "label": "rating", "ratings": True, "seed": 0}
    path = SENTIMENT / f"{domain}.tsv.gz"
    rows = _tokenised(read_dataset(path, held_out=0, **options).train)
    once = {tuple(row["input_ids"]): row for row in rows if tokens(row) <= LENGTH}
    rows = list(once.values())
    judged, rows = rows[: TEST + VALIDATION], rows[TEST + VALIDATION :]
    test, validation = (sorted(part, key=tokens) for part in (judged[:TEST], judged[TEST:]))
    return Task(domain, rows[:TRAIN], validation, test, minilm)


def _tokenised(rows: list[Any]) -> list[Example]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled())
    found = tokenizer([row.text for row in rows], truncation=True, max_length=LENGTH + 1)
    keys = ("input_ids", "attention_mask")
    return [
        {**{key: found[key][at] for key in keys}, "labels": row.label}
        for at, row in enumerate(rows)
    ]


def minilm(seed: int) -> nn.Module:
    """The bundled MiniLM without dropout, its head drawn from the seed."""
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(bundled(), num_labels=2, **NO_DROPOUT)


def task(name: str) -> Task:
    """A task by its name."""
    from benchmarks.quality.digits import digits

    return digits() if name == "digits" else sentiment(name)
