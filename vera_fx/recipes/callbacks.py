"""What a run does between the steps of Trainer: marks checkpoints, stops early, refuses to diverge."""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vera_fx.errors import ConfigError
from vera_fx.recipes import checkpoints
from vera_fx.recipes.checkpoints import History


class Keeper(TrainerCallback):
    """Marks each checkpoint that is whole, and removes those that nothing needs any more.

    Attributes:
        shapes: what batches were seen, in the order of their first times.
    """

    def __init__(self, root: Path, metric: str, *, greater: bool, shapes: list[Any]) -> None:
        self._root, self._metric, self._greater = root, metric, greater
        self.shapes = shapes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the last step too; let a checkpoint hold the losses up to it.

        What Trainer has not logged is lost by a kill.
        """
        del kwargs
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer has written a checkpoint."""
        del args, control, kwargs
        step = state.global_step
        checkpoints.mark(checkpoints.at(self._root, step), self.shapes)
        best = checkpoints.best_step(state.log_history, self._metric, greater=self._greater)
        checkpoints.sweep(self._root, [step, *(() if best is None else (best,))])


class Stopper(TrainerCallback):
    """Stops a run whose evaluations have not become better for a while; knows it from the log alone."""

    def __init__(self, metric: str, patience: int | None, *, greater: bool) -> None:
        self._metric, self._patience, self._greater = metric, patience, greater

    def is_over(self, history: History) -> bool:
        """Whether a run with that log has stopped."""
        return checkpoints.is_stale(history, self._metric, self._patience, greater=self._greater)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation has been logged."""
        del args, kwargs
        control.should_training_stop = control.should_training_stop or self.is_over(
            state.log_history
        )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Losses have been logged.

        Raises:
            ConfigError: they are numbers no more.
        """
        del args, control, kwargs
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise ConfigError(
                f"training diverged: at step {state.global_step} the loss is {loss}; train in a new folder "
                "with a smaller rate, a longer warmup, or dtype: float32"
            )
