"""The example as its users start it: one process, torchrun with DDP, torchrun with FSDP2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import assert_close

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/distributed/train.py"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0")  # fmt: skip


def run(out: Path, *before: str, more: tuple[str, ...] = ()) -> tuple[float, float]:
    """The first loss and the last."""
    command = [sys.executable, *before, SCRIPT, "--steps", "12", "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"loss ([\d.]+) -> ([\d.]+) in 12 steps, (\d) process", done.stdout)
    assert found, done.stdout
    assert int(found[3]) == (2 if before else 1)
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_one_script_for_all(tmp_path: Path) -> None:
    one = run(tmp_path / "one")
    wrapped = run(tmp_path / "ddp", *TORCHRUN)
    sharded = run(tmp_path / "fsdp2", *TORCHRUN, more=("--shard",))
    for first, last in (one, wrapped, sharded):
        assert last < first - 0.05
    # Two processes deal out rows in another way than one; with each other they agree.
    assert wrapped == pytest.approx(sharded, abs=2e-3)
    assert one[0] == pytest.approx(wrapped[0], abs=5e-2)
    states = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ddp", "fsdp2")]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert_close(states[1][key], value, factor=100, what=key)
