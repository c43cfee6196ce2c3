"""Progress of a training run on stderr: live on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from vera_fx.recipes.trainer import RecipeTrainer, Steps


class Live(TrainerCallback):
    """Shows steps, what is left, loss, rows or tokens a second, and memory; a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        # Drawn at steps alone: between them a capture may write its own line.
        self._bar = Progress(
            *columns,
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=None, figures="")
        self._loss = float("nan")
        self._begun = self._started = self._seen = 0.0
        self._trainer: Any = None
        self._total = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def watch(self, steps: Steps, begun: int, trainer: RecipeTrainer) -> Sequence[Any]:
        """A `vera_fx.recipes.train.Watcher`."""
        self._trainer, self._begun, self._total = trainer, begun, steps.total
        word = f"goes on after step {begun}" if begun else "begins"
        self._console.print(f"training {word}: {steps.total} steps on {trainer.args.device}")
        self._bar.update(self._task, total=steps.total, completed=begun)
        return (self,)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step begins."""
        del args, state, control, kwargs
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step was made."""
        del args, control, kwargs
        self._bar.update(
            self._task, completed=state.global_step, figures=self._figures(), refresh=True
        )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Losses or evaluations have been logged."""
        del args, control, kwargs
        step = state.global_step
        if "loss" in (logs or {}):
            self._loss = (logs or {})["loss"]
            if not self._console.is_terminal:
                left = self._left(step)
                self._console.print(f"step {step}/{self._total}, {self._figures()}, {left} left")
        found = {n[5:]: v for n, v in (logs or {}).items() if n.startswith("eval_")}
        if found:
            text = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            self._console.print(f"step {step}, evaluation: {text}")

    def _figures(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = f"{self._trainer.seen / seconds:,.0f} {self._trainer.unit}/s"
        return f"loss {self._loss:.4f}, {speed}, {memory()}"

    def _left(self, step: int) -> str:
        done = max(step - self._begun, 1)
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        return str(timedelta(seconds=round(seconds)))


def memory() -> str:
    """The most memory so far: the accelerator's, or the process's."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() >> 20:,} MiB"
    try:
        import resource
    except ImportError:  # Windows
        return "memory unknown"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{most >> (20 if sys.platform == 'darwin' else 10):,} MiB"
