"""One run: train one method on one task from one seed, and judge it."""

import ctypes
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import vera_fx
from benchmarks.quality.methods import HEAD, HEAD_RATE, groups, method, vera_config
from benchmarks.quality.tasks import Example, Task, collated, in_batches, task, tokens
from benchmarks.report import resident

WARMUP = 0.06
"""Share of the steps, as in the paper."""


@dataclass(frozen=True)
class Run:
    """What is trained, and what it is judged by.

    Attributes:
        stage: the table that it belongs to.
        task: a domain, or ``"digits"``.
        method: a name in `benchmarks.quality.methods`.
        lr: learning rate.
        seed: of head, order, projections.
        part: ``"validation"`` or ``"test"``.
    """

    stage: str
    task: str
    method: str
    lr: float
    seed: int
    part: str = "test"

    @property
    def key(self) -> str:
        """One line of the results."""
        return f"{self.stage} | {self.task} | {self.method} | lr={self.lr:g} | seed={self.seed}"


def perform(run: Run) -> dict[str, dict[str, Any]]:
    """Train and judge; the results by the run's key."""
    found = task(run.task)
    way = method(run.task, run.method)
    model = way.prepare(found.base(run.seed), run.seed).train()
    steps, judged = found.batches(run.seed), getattr(found, run.part)
    if way.kind == "head":
        model, steps, judged = _over_features(model, steps, judged)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = time.process_time()
    optimizer = torch.optim.AdamW(groups(model, way.kind, run.lr), weight_decay=0.0)
    seconds = train(model, optimizer, steps)
    total = time.process_time() - before
    result = judge(model, judged)
    held = step_bytes(model.train(), optimizer, max(steps, key=lambda rows: sum(map(tokens, rows))))
    head = sum(p.numel() for n, p in model.named_parameters() if HEAD in n and p.requires_grad)
    numbers = sum(p.numel() for p in trained)
    costs = {
        "step_ms": round(1e3 * statistics.median(seconds), 1),
        "train_cpu_s": round(total, 2),
        "step_bytes": held,
        "moments_bytes": 8 * numbers,
    }
    counts = {"trained": numbers, "head": head, "steps": len(steps)}
    return {run.key: {**facts(run), **result, **counts, **costs}}


def facts(run: Run) -> dict[str, Any]:
    """The run's own fields."""
    fields = ("stage", "task", "method", "lr", "seed", "part")
    return {name: getattr(run, name) for name in fields}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[list[Example]]
) -> list[float]:
    """A linear schedule with warm-up; CPU seconds of each step."""
    seconds = list[float]()
    settings = settings_for(len(batches), 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
    for rows in batches:
        start = time.process_time()
        model(**collated(rows)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return seconds


def step_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Example]) -> int:
    """Bytes that one more step takes at most beyond what is held between steps; Linux only.

    The step's rate is the schedule's last, 0, so that it changes nothing.
    """
    batch = collated(rows)
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # begins the peak anew
    model(**batch).loss.backward()
    optimizer.step()
    return resident(peak=True) - before


def settings_for(steps: int, lr: float, **others: Any) -> vera_fx.TrainSettings:
    """The schedule of every run, as `train_many` takes it."""
    return vera_fx.TrainSettings(steps=steps, lr=lr, warmup=round(WARMUP * steps), **others)


@torch.no_grad()
def judge(model: nn.Module, rows: list[Example]) -> dict[str, Any]:
    """Accuracy, mean loss, and every prediction as a digit."""
    model.eval()
    logits = torch.cat([model(**_without_labels(batch)).logits for batch in in_batches(rows)])
    labels = torch.tensor([row["labels"] for row in rows])
    chosen = logits.argmax(-1)
    loss = nn.functional.cross_entropy(logits, labels).item()
    right = (chosen == labels).float().mean().item()
    predictions = "".join(map(str, chosen.tolist()))
    return {"accuracy": round(right, 6), "loss": round(loss, 5), "predictions": predictions}


def _without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


class OverFeatures(nn.Module):
    """A head over what the frozen model gave it once: there is no dropout, so nothing changes."""

    def __init__(self, head: nn.Module) -> None:
        """Args: the head."""
        super().__init__()
        self.add_module(HEAD, head)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Any:
        """Logits, and the loss where there are labels."""
        logits = self.get_submodule(HEAD)(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def _over_features(
    model: nn.Module, steps: list[list[Example]], judged: list[Example]
) -> tuple[nn.Module, list[list[Example]], list[Example]]:
    """The same run with every example as the head's input."""
    rows = {id(row): row for part in (*steps, judged) for row in part}
    seen: list[Tensor] = []
    head = model.get_submodule(HEAD)
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in in_batches(list(rows.values())):
            model(**batch)
    hook.remove()
    kept = {
        key: {"features": features, "labels": row["labels"]}
        for (key, row), features in zip(rows.items(), torch.cat(seen), strict=True)
    }
    short = [[kept[id(row)] for row in part] for part in steps]
    return OverFeatures(head), short, [kept[id(row)] for row in judged]


def many(first: Run, rates: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """`vera_fx.train_many`: one VeRA method under several rates, in one batch.

    The same sentences in the same steps as each would take alone, so that only rounding differs.
    """
    found: Task = task(first.task)
    steps = found.batches(first.seed)
    rows = [row for part in steps for row in part]
    config = vera_config(method(first.task, first.method).fields, first.seed)
    options = {"batch_size": found.batch_size, "shuffle": False, "copies_lr": HEAD_RATE}
    names = {f"rate{at}": rate for at, rate in enumerate(rates)}
    jobs = {
        name: (config, rows, settings_for(len(steps), lr, **options)) for name, lr in names.items()
    }
    model = found.base(first.seed)
    start = time.process_time()
    vera_fx.train_many(model, jobs)
    total = round(time.process_time() - start, 2)
    results: dict[str, dict[str, Any]] = {}
    for name, lr in names.items():
        vera_fx.set_adapter(model, name)
        run = Run(first.stage, first.task, first.method, lr, first.seed, first.part)
        results[run.key] = {
            **facts(run),
            **judge(model, getattr(found, first.part)),
            "batch_cpu_s": total,
        }
    return results
