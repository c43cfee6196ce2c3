"""A process that is killed without a word: the next one ends at the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.jobs import trained
from tests.training.test_state import jobs, model_with_dropout, run
from vera_fx.training.state_file import STATE_FILE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("where", "count", "left"),
    [("step", 5, 4), pytest.param("write", 3, 5, marks=pytest.mark.slow)],
)
def test_killed_processes_go_on(tmp_path: Path, where: str, count: int, left: int) -> None:
    """After a step that no state has, and while a state is written: the one before is whole."""
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path), where, str(count)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert (tmp_path / STATE_FILE).is_file()

    whole, second = model_with_dropout(), model_with_dropout()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected, steps = run(whole), list[int]()
        torch.manual_seed(99)
        found = _resumed(second, tmp_path, steps)
    finally:
        torch.set_num_threads(threads)
    assert len(steps) == left
    for name in jobs():
        for key, value in trained(whole, name).items():
            assert torch.equal(trained(second, name)[key], value), f"{name} {key}"
        this, that = found[name], expected[name]
        assert (this.status, this.step, this.loss) == (that.status, that.step, that.loss)
    assert found.passes == expected.passes


def _resumed(model: Any, folder: Path, steps: list[int]) -> Any:
    return run(model, state=folder, save_every=2, on_step=lambda _: steps.append(1))
