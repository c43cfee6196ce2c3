"""Runs the jobs of `tests.training.test_state`, and kills its own process.

python -m tests.training.killed FOLDER step N     # after the Nth step
python -m tests.training.killed FOLDER write N    # when the Nth state is written, and not yet in its place
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.test_state import model_with_dropout, run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write(count: int) -> None:
    """The rename that puts a state into its place is never reached."""
    replace, calls = os.replace, 0

    def deadly(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            die()
        replace(*args, **kwargs)

    os.replace = deadly


def main(folder: Path, where: str, count: int) -> None:
    def on_step(many: Any) -> None:
        if where == "step" and max(job.progress.step for job in many.jobs.values()) == count:
            die()

    if where == "write":
        kill_in_write(count)
    torch.set_num_threads(1)
    run(model_with_dropout(), state=folder, save_every=2, on_step=on_step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
