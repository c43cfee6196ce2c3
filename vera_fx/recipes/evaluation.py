"""Figures of a model over rows: the same loop in the middle of training and after it."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vera_fx.recipes.data import Rows
from vera_fx.recipes.tasks.protocol import Row, Task, on_device_of


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, rows: Rows, size: int) -> dict[str, float]:
    """The task's figures; the model's mode stays.

    Args:
        model: an adapted model.
        task: the task.
        rows: with the columns that the task trains on.
        size: rows in a batch.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    training = model.training
    model.eval()
    try:
        for some in batches(rows, size):
            batch = on_device_of(model, task.batch(some))
            for name, values in task.measure(model, batch).items():
                found[name].append(values.cpu())
    finally:
        model.train(training)
    return task.score({name: torch.cat(parts) for name, parts in found.items()})


def batches(rows: Rows, size: int) -> Iterator[list[Row]]:
    """The rows, some at a time, in their order."""
    for start in range(0, len(rows), size):
        yield [rows[number] for number in range(start, min(start + size, len(rows)))]
