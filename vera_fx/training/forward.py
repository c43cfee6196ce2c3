"""Rows of several jobs through the base at once: batches, losses, gradients, evaluations."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vera_fx.errors import ConfigError
from vera_fx.mixing.gather import TableNames
from vera_fx.training.examples import Batch, Collate, Example, length_of, packed
from vera_fx.training.job import Job
from vera_fx.training.row_losses import RowLosses, kind_of_loss, label_counts, row_losses
from vera_fx.training.tables import Tables

Row = tuple[str, Example]
"""A row of a batch: whose it is, and what."""


@dataclass(slots=True)
class Forward:
    """How rows go through the model, and what that took.

    Attributes:
        model: the adapted model.
        call: what is called: the model, or what ``torch.compile`` made of it.
        collate: makes a batch of examples.
        kind: of the loss (`row_losses`); None until the first batch tells it.
        most: tokens of a pass with its padding; None for one pass, however large.
        figures: passes, tokens in them, and how many of these were examples' own.
    """

    model: nn.Module
    call: Any
    collate: Collate
    kind: str | None = None
    most: int | None = None
    figures: Counter[str] = field(default_factory=Counter[str])

    def batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[str], Batch]]:
        """The rows in passes: whose each row is, and the batch, still on the CPU.

        Raises:
            ConfigError: the batch has no labels, or another number of rows.
        """
        lengths = [length_of(example) for _, example in rows]
        for chosen in packed(lengths, self.most):
            batch = dict(self.collate([rows[row][1] for row in chosen]))
            labels = batch.get("labels")
            if not isinstance(labels, Tensor) or len(labels) != len(chosen):
                raise ConfigError(
                    f"examples need 'labels', one per row; a batch of {len(chosen)} examples has "
                    f"{sorted(batch)}"
                )
            self.kind = self.kind or kind_of_loss(self.model, labels)
            self.figures["passes"] += 1
            self.figures["tokens"] += len(chosen) * max(lengths[row] for row in chosen)
            self.figures["own"] += sum(lengths[row] for row in chosen)
            yield [rows[row][0] for row in chosen], batch

    def losses(self, names: list[str], batch: Batch, tables: Tables) -> tuple[RowLosses, Tensor]:
        """The losses of a batch by row, and its logits."""
        device = next(self.model.parameters()).device
        given = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        output = self.call(**given, adapter_names=TableNames(names, tables.for_mixing()))
        logits = getattr(output, "logits", output)
        logits = logits if isinstance(logits, Tensor) else logits[0]
        return row_losses(self.model, logits, batch["labels"], kind=self.kind), logits


def gradients(forward: Forward, rows: Sequence[Row], tables: Tables) -> dict[str, float]:
    """Add each job's gradient to its rows of the tables; the losses, each a mean over its own tokens.

    A job's loss is a sum over its rows divided by its count of labels, which is known before: so it
    does not matter which rows go through the base together, nor in how many passes.
    """
    batches = list(forward.batches(rows))
    counts, found = Counter[str](), dict[str, Any]()
    for names, batch in batches:
        for name, count in zip(names, _counts(forward, batch), strict=True):
            counts[name] += count
    for names, batch in batches:
        losses, _ = forward.losses(names, batch, tables)
        shares = torch.tensor([1 / max(counts[name], 1) for name in names])
        weighted = losses.sums * shares.to(losses.sums.device)
        weighted.sum().backward()
        for name, loss in zip(names, weighted.tolist(), strict=True):
            found[name] = found.get(name, 0.0) + loss
    return found


def _counts(forward: Forward, batch: Batch) -> list[int]:
    return label_counts(str(forward.kind), batch["labels"]).tolist()


@torch.no_grad()
def evaluate(
    forward: Forward, jobs: Iterable[Job], tables: Tables, rows: int
) -> dict[str, tuple[float, float | None]]:
    """The loss of each job on its held-out examples; and the share of right answers of classifiers.

    Args:
        forward: the model.
        jobs: those to evaluate, all in the same passes.
        tables: their values.
        rows: most rows of a pass.
    """
    sums, counts, hits = Counter[str](), Counter[str](), Counter[str]()
    every = (
        (job.name, held[at]) for job in jobs if (held := job.held_out) for at in range(len(held))
    )
    while chunk := list(islice(every, rows)):
        for names, batch in forward.batches(chunk):
            losses, logits = forward.losses(names, batch, tables)
            right = _right(forward, logits, batch["labels"])
            found = zip(names, losses.sums.tolist(), losses.counts.tolist(), right, strict=True)
            for name, loss, count, hit in found:
                sums[name] += loss  # type: ignore[assignment]
                counts[name] += count
                hits[name] += hit
    return {
        name: (
            sums[name] / max(counts[name], 1),
            hits[name] / counts[name] if forward.kind == "classes" and counts[name] else None,
        )
        for name in sums
    }


def _right(forward: Forward, logits: Tensor, labels: Tensor) -> list[int]:
    """Whether each row's class is the one with the largest logit; zeros for other losses."""
    if forward.kind != "classes":
        return [0] * len(labels)
    return (logits.argmax(-1) == labels.to(logits.device)).int().tolist()
