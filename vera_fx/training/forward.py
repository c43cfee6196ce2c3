"""Rows of several jobs through the base at once: batches, losses, gradients, evaluations."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vera_fx.bank.bank import bank_of
from vera_fx.errors import ConfigError
from vera_fx.mixing.gather import TableNames
from vera_fx.processes.group import Processes
from vera_fx.training.examples import Batch, Collate, Example, length_of, packed
from vera_fx.training.job import Job
from vera_fx.training.row_losses import RowLosses, kind_of_loss, label_counts, row_losses
from vera_fx.training.tables import Tables

Row = tuple[str, Example]
"""A row of a batch: whose it is, and what."""

_WINDOW = 64
"""Passes' worth of held-out rows that are read and sorted by length at once, so that little is padding."""


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
        processes: which share the rows; each takes its part of them through the model.
    """

    model: nn.Module
    call: Any
    collate: Collate
    kind: str | None = None
    most: int | None = None
    figures: Counter[str] = field(default_factory=Counter[str])
    processes: Processes = field(default_factory=Processes)

    def batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[str], Batch]]:
        """The rows in passes: whose each row is, and the batch, still on the CPU.

        Raises:
            ConfigError: the batch has no labels, or another number of rows.
        """
        for part in self._of_one_dropout(rows):
            yield from self._batches(part)

    def _of_one_dropout(self, rows: Sequence[Row]) -> list[list[Row]]:
        """In train mode rows whose adapters drop differently go apart: a graph drops at one rate."""
        parts: dict[float, list[Row]] = {}
        for row in rows:
            rate = bank_of(self.model).adapter(row[0]).config.dropout if self.model.training else 0
            parts.setdefault(rate, []).append(row)
        return [part for _, part in sorted(parts.items())]

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[str], Batch]]:
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


def gradients(
    forward: Forward, rows: Iterable[Row], tables: Tables, what: str = "a step"
) -> dict[str, float]:
    """Add each job's gradient to its rows of the tables; the losses, each a mean over its own tokens.

    A job's loss is a sum over its rows divided by its count of labels, which is known before: so it
    does not matter which rows go through the base together, in how many passes, nor in which process.

    Args:
        forward: the model.
        rows: of this process.
        tables: the jobs' values.
        what: the step that all processes must be at.
    """
    batches: list[tuple[list[str], Batch]] = []
    counts = _together(forward, what, lambda: _counted(forward, rows, batches))
    losses = _together(
        forward, "forward and backward", lambda: _backward(forward, batches, counts, tables)
    )
    forward.processes.add_up_gradients([table.values for table in tables.by_key.values()])
    return losses


def _together(
    forward: Forward, what: str, work: Callable[[], Mapping[str, float]]
) -> dict[str, float]:
    """The sums over all processes of what each finds; the figures become those of all, too."""
    before = forward.figures.copy()

    def own() -> tuple[Mapping[str, float], Counter[str], str | None]:
        return work(), forward.figures - before, forward.kind

    found = forward.processes.agree(what, own)
    forward.figures = before
    sums: dict[str, float] = {}
    for values, figures, kind in found:
        forward.kind = forward.kind or kind
        forward.figures.update(figures)
        for name, value in values.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _counted(
    forward: Forward, rows: Iterable[Row], batches: list[tuple[list[str], Batch]]
) -> Counter[str]:
    """Make the batches, and count each job's labels in them."""
    batches += forward.batches(list(rows))
    counts = Counter[str]()
    for names, batch in batches:
        for name, count in zip(names, _counts(forward, batch), strict=True):
            counts[name] += count
    return counts


def _backward(
    forward: Forward,
    batches: Iterable[tuple[list[str], Batch]],
    counts: Mapping[str, float],
    tables: Tables,
) -> dict[str, float]:
    """The gradients of this process's rows, and their share of each job's loss."""
    found: dict[str, float] = {}
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
        rows: most rows of a pass, those of all processes together.
    """
    jobs = list(jobs)
    found = _together(forward, "an evaluation", lambda: _evaluated(forward, jobs, tables, rows))
    judged: dict[str, tuple[float, float | None]] = {}
    for name in [job.name for job in jobs if f"loss {job.name}" in found]:
        loss, count, hits = (found[f"{what} {name}"] for what in ("loss", "count", "hits"))
        right = hits / count if forward.kind == "classes" and count else None
        judged[name] = loss / max(count, 1), right
    return judged


def _evaluated(forward: Forward, jobs: Iterable[Job], tables: Tables, rows: int) -> Counter[str]:
    """Sums of losses, labels and right answers over this process's share of the examples."""
    found, own = Counter[str](), -(-rows // forward.processes.size)
    every = (
        (job.name, held, at) for job in jobs if (held := job.held_out) for at in range(len(held))
    )
    while window := list(islice(every, _WINDOW * rows)):
        mine = [(name, held[at]) for name, held, at in forward.processes.share(window)]
        mine.sort(key=lambda row: -length_of(row[1]))
        for start in range(0, len(mine), own):
            for names, batch in forward.batches(mine[start : start + own]):
                losses, logits = forward.losses(names, batch, tables)
                right = _right(forward, logits, batch["labels"])
                each = zip(names, losses.sums.tolist(), losses.counts.tolist(), right, strict=True)
                for name, *values in each:
                    for what, value in zip(("loss", "count", "hits"), values, strict=True):
                        found[f"{what} {name}"] += value
    return found


def _right(forward: Forward, logits: Tensor, labels: Tensor) -> list[int]:
    """Whether each row's class is the one with the largest logit; zeros for other losses."""
    if forward.kind != "classes":
        return [0] * len(labels)
    return (logits.argmax(-1) == labels.to(logits.device)).int().tolist()


def base_and_call(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model itself, and what is called: it, or what ``torch.compile`` made of it.

    `DistributedDataParallel` is left aside: it would reduce the adapters' own parameters, and what
    trains are tables of them.

    Raises:
        ConfigError: the model was wrapped in `DistributedDataParallel` and then compiled.
    """
    while isinstance(model, DistributedDataParallel):
        model = model.module
    base = getattr(model, "_orig_mod", model)
    if isinstance(base, DistributedDataParallel):
        raise ConfigError(
            "train_many reduces gradients itself and cannot take DistributedDataParallel out of a compiled "
            "model; give it torch.compile(model) without the wrapper"
        )
    return base, model


class modes_kept:  # noqa: N801  # a context manager
    """Afterwards every module is in the mode, train or eval, in which it was."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode
