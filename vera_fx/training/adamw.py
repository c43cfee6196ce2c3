"""AdamW (arXiv 1711.05101) over tables: every row with a rate, decay and step of its own, in one update.

The operations are those of ``torch.optim.AdamW``, in their order, with a column of numbers where
torch has one number. So the cost of a step does not depend on how many jobs there are.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vera_fx.training.settings import TrainSettings
from vera_fx.training.tables import Table, Tables, column


def gradient_norms(tables: Tables, names: list[str]) -> dict[str, float]:
    """The norm of each job's gradient over all that it trains; not finite where some of it is not."""
    device = next(iter(tables.by_key.values())).values.device
    squares = torch.zeros(len(names), device=device)
    for table in tables.by_key.values():
        if table.values.grad is not None:
            places = torch.tensor([names.index(name) for name in table.names], device=device)
            own = table.values.grad.float().flatten(1).square().sum(1)
            squares.index_add_(0, places, own)
    return dict(zip(names, squares.sqrt().tolist(), strict=True))


@torch.no_grad()
def update(
    tables: Tables,
    settings: Mapping[str, TrainSettings],
    steps: Mapping[str, int],
    norms: Mapping[str, float],
) -> None:
    """One step of every job in ``steps``; rows of all others stay as they are, to the bit.

    Args:
        tables: values with gradients, which are dropped.
        settings: by job.
        steps: how many steps each job has done, for those that are to do one.
        norms: of the jobs' gradients.
    """
    for table in tables.by_key.values():
        gradient, table.values.grad = table.values.grad, None
        if gradient is not None and any(name in steps for name in table.names):
            _update(table, gradient, settings, steps, norms)


def _update(
    table: Table,
    gradient: Tensor,
    settings: Mapping[str, TrainSettings],
    steps: Mapping[str, int],
    norms: Mapping[str, float],
) -> None:
    rows = [at for at, name in enumerate(table.names) if name in steps]
    who = [table.names[at] for at in rows]
    every = len(rows) == len(table.names)
    index = slice(None) if every else torch.tensor(rows, device=gradient.device)
    new = _stepped(
        [part[index] for part in (table.values.detach(), table.first, table.second)],
        gradient[index],
        [settings[name] for name in who],
        [steps[name] for name in who],
        [norms[name] for name in who],
        copies=table.copies,
    )
    for part, value in zip((table.values, table.first, table.second), new, strict=True):
        part[index] = value


def _stepped(
    parts: list[Tensor],
    gradient: Tensor,
    settings: list[TrainSettings],
    steps: list[int],
    norms: list[float],
    *,
    copies: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    values, first, second = parts
    clips = [
        min(1.0, s.max_norm / (n + 1e-6)) if s.max_norm else 1.0
        for s, n in zip(settings, norms, strict=True)
    ]
    rates = [s.rate(step, copies=copies) for s, step in zip(settings, steps, strict=True)]

    def numbers(found: list[float]) -> Tensor:
        return column(found, values)

    if any(clip != 1.0 for clip in clips):
        gradient = gradient * numbers(clips)
    decay = numbers([1 - rate * s.weight_decay for rate, s in zip(rates, settings, strict=True)])
    first = first.lerp(gradient, numbers([1 - s.betas[0] for s in settings]))
    second = second * numbers([s.betas[1] for s in settings])
    second = second + (gradient * numbers([1 - s.betas[1] for s in settings])) * gradient
    counted = list(zip(settings, steps, strict=True))
    third = numbers([math.sqrt(1 - s.betas[1] ** (step + 1)) for s, step in counted])
    size = [
        rate / (1 - s.betas[0] ** (step + 1))
        for rate, (s, step) in zip(rates, counted, strict=True)
    ]
    denominator = second.sqrt() / third + numbers([s.eps for s in settings])
    return values * decay - numbers(size) * first / denominator, first, second
