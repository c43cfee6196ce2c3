"""One update of a table against ``torch.optim.AdamW`` on each of its rows."""

import torch
from torch import Tensor, nn

from tests.helpers import assert_close
from vera_fx import TrainSettings
from vera_fx.training.adamw import gradient_norms, update
from vera_fx.training.tables import Table, Tables

SETTINGS = {
    "a": TrainSettings(steps=9, lr=0.03, schedule="constant"),
    "b": TrainSettings(steps=9, lr=0.5, weight_decay=0.3, betas=(0.7, 0.8), eps=1e-3),
    "c": TrainSettings(steps=9, lr=0.1, max_norm=0.5, warmup=2, schedule="cosine"),
    "d": TrainSettings(steps=9, lr=0.02, copies_lr=0.3, schedule="constant"),
}
SHAPES = {"rows": (4, 7), "head": (2, 3, 5)}
"""The head is of the last two jobs alone."""


def tables() -> Tables:
    generator = torch.Generator().manual_seed(1)
    made = Tables()
    for key, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator).requires_grad_()
        names = list("abcd"[-shape[0] :])
        parts = values, torch.zeros(shape), torch.zeros(shape)
        made.by_key[key] = Table(names, *parts, copies=key == "head")
    return made


def alone(table: Table, name: str) -> tuple[nn.Parameter, float]:
    row = table.row(name)["values"]
    settings = SETTINGS[name]
    rate = settings.copies_lr if table.copies and settings.copies_lr is not None else settings.lr
    return nn.Parameter(row), rate


def test_every_row_as_by_torchs_own() -> None:
    """Jobs begin at different times, and one rests: its row stays to the bit."""
    made, generator = tables(), torch.Generator().manual_seed(2)
    own = {(n, key): alone(t, n) for key, t in made.by_key.items() for n in t.names}
    optimizers = {}
    for name, settings in SETTINGS.items():
        groups = [{"params": [p], "lr": lr} for (n, _), (p, lr) in own.items() if n == name]
        options = {"betas": settings.betas, "eps": settings.eps}
        optimizers[name] = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, **options)
    done = dict.fromkeys(SETTINGS, 0)
    for turn in range(7):
        going = [
            n for n in SETTINGS if not (n == "b" and turn == 3) and not (n == "c" and turn < 2)
        ]
        for table in made.by_key.values():
            table.values.grad = torch.randn(table.values.shape, generator=generator)
        norms = gradient_norms(made, list(SETTINGS))
        before = {key: table.row("c")["values"] for key, table in made.by_key.items()}
        for name in going:
            step_alone(made, own, optimizers[name], name, done[name], norms[name])
        update(made, SETTINGS, {name: done[name] for name in going}, norms)
        for name in going:
            done[name] += 1
        for (name, key), (parameter, _) in own.items():
            assert_close(
                made.by_key[key].row(name)["values"], parameter.detach(), what=f"{name} {key}"
            )
        assert ("c" in going) != torch.equal(
            made.by_key["rows"].row("c")["values"], before["rows"]
        ) or turn == 2
        assert all(table.values.grad is None for table in made.by_key.values())
    assert done == {"a": 7, "b": 6, "c": 5, "d": 7}


def step_alone(
    made: Tables, own: dict, optimizer: torch.optim.AdamW, name: str, step: int, norm: float
) -> None:
    settings, parameters = SETTINGS[name], list[Tensor]()
    for (who, key), (parameter, _) in own.items():
        if who == name:
            at = made.by_key[key].names.index(name)
            parameter.grad = made.by_key[key].values.grad[at].clone()
            parameters.append(parameter)
    total = nn.utils.clip_grad_norm_(parameters, settings.max_norm or float("inf"))
    assert abs(total.item() - norm) < 1e-4 * norm
    for group in optimizer.param_groups:
        peak = group.setdefault("peak", group["lr"])
        group["lr"] = peak * settings.rate(step) / settings.lr
    optimizer.step()


def test_a_gradient_that_is_not_finite_is_seen_in_its_row_alone() -> None:
    made = tables()
    for table in made.by_key.values():
        table.values.grad = torch.ones_like(table.values)
    made.by_key["head"].values.grad[1, 2, 2] = float("nan")
    norms = gradient_norms(made, list("abcd"))
    assert [torch.tensor(norms[name]).isfinite().item() for name in "abcd"] == [
        True,
        True,
        True,
        False,
    ]
