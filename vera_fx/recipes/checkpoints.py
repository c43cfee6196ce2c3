"""Checkpoints of a run: which of them are whole, which is the last, which the best.

A process may be killed while it writes one. Whole is what has a mark, which is written after
everything else is on the disk.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from vera_fx.checkpoint.pretrained import RESUMED_FROM
from vera_fx.disk.files import flush, flush_folder, moved_into
from vera_fx.errors import CheckpointError

MARK = "vera_fx_complete.json"
_STATE = "trainer_state.json"
_PREFIX = "checkpoint-"

History = Sequence[Mapping[str, Any]]
"""What Trainer logged, in order."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: where it is.
        step: after how many steps it was made.
        history: the run's log up to there.
        shapes: what batches had been seen up to there, in the order of their first times.
    """

    folder: Path
    step: int
    history: History
    shapes: list[Any]


def mark(folder: Path, shapes: Sequence[Any]) -> None:
    """Bring a checkpoint to the disk, and then say that it is whole.

    Raises:
        OSError: it cannot be written.
    """
    for file in folder.iterdir():
        if file.is_file():
            flush(file)
    flush_folder(folder)
    with moved_into(folder) as aside:
        (aside / MARK).write_text(json.dumps({"shapes": list(shapes)}), encoding="utf-8")


def steps_of(root: Path) -> list[int]:
    """The steps that there are whole checkpoints of, rising."""
    found = (path.parent.name.removeprefix(_PREFIX) for path in root.glob(f"{_PREFIX}*/{MARK}"))
    return sorted(int(step) for step in found if step.isdecimal())


def at(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"{_PREFIX}{step}"


def last(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint.

    Raises:
        CheckpointError: its files were damaged since.
    """
    steps = steps_of(root)
    if not steps:
        return None
    folder = at(root, steps[-1])
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        shapes = json.loads((folder / MARK).read_text(encoding="utf-8"))["shapes"]
        return Checkpoint(folder, state["global_step"], state["log_history"], shapes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged ({error}); delete it, and training goes on from the "
            "one before"
        ) from error


def sweep(root: Path, keep: Sequence[int] | None = None) -> None:
    """Remove checkpoints that are not whole, and all but some of the others.

    Args:
        root: the folder that they are in.
        keep: steps of those to keep; None for all that are whole.
    """
    wanted = {at(root, step) for step in (steps_of(root) if keep is None else keep)}
    for folder in root.glob(f"{_PREFIX}*"):
        if folder not in wanted:
            # First the mark: what is half removed is not whole.
            (folder / MARK).unlink(missing_ok=True)
            shutil.rmtree(folder)


def best_step(history: History, metric: str, *, greater: bool) -> int | None:
    """The first step with the best figure, of equal ones that with the smaller loss.

    None if no figure is a number.
    """
    key, sign = f"eval_{metric}", -1 if greater else 1
    found = [entry for entry in history if key in entry and not math.isnan(entry[key])]
    best = min(found, key=lambda entry: (sign * entry[key], entry["eval_loss"]), default=None)
    return None if best is None else best["step"]


def is_stale(history: History, metric: str, patience: int | None, *, greater: bool) -> bool:
    """Whether so many evaluations have gone by since the best one that a run is to stop."""
    if patience is None:
        return False
    steps = [entry["step"] for entry in history if f"eval_{metric}" in entry]
    best = best_step(history, metric, greater=greater)
    since = len([step for step in steps if best is None or step > best])
    return since >= patience


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give an adapted model the adapter of a checkpoint, as Trainer resumes from it.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    file = folder / RESUMED_FROM
    try:
        state = load_file(file)
        result = model.load_state_dict(state, strict=False)
    except Exception as error:  # safetensors' and torch's own
        raise CheckpointError(f"{file} cannot be loaded: {error}") from error
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if result.unexpected_keys or trained & set(result.missing_keys):
        raise CheckpointError(f"{file} does not hold the adapter of this run's recipe")
