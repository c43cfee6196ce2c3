"""A script of `train_many` under the real `accelerate launch`: two processes end where one does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import vera_fx
from tests.distributed.test_example import ROOT
from tests.training.jobs import assert_trained_alike, classifier, trained
from tests.training.test_many import JOBS

SCRIPT = "tests/distributed/many_launched.py"


def launched(folder: Path) -> None:
    """The example's file for DDP is for GPUs: on the CPU one word of it differs."""
    text = (ROOT / "examples/distributed/ddp.yaml").read_text(encoding="utf-8")
    file = folder / "ddp.yaml"
    file.write_text(re.sub("use_cpu: false", "use_cpu: true", text), encoding="utf-8")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(file))
    command = [sys.executable, *launcher, "--main_process_port", "0", SCRIPT, str(folder)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, cwd=ROOT, env={**surroundings, "PYTHONPATH": path}, capture_output=True,
        text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    model = classifier()
    expected = vera_fx.train_many(model, JOBS, progress=False)
    launched(tmp_path)
    files = [tmp_path / f"rank{rank}.safetensors" for rank in range(2)]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"backend": "gloo", "world": "2"}
    first, second = map(load_file, files)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[key], value) for key, value in first.items())
    for name in JOBS:
        own = {key: first[f"{name} {key}"] for key in trained(model, name)}
        assert_trained_alike(own, trained(model, name))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {n: (j["status"], j["step"], j["tokens"]) for n, j in results["jobs"].items()} == {
        name: (job.status, job.step, job.tokens) for name, job in expected.items()
    }
    assert results["passes"] > expected.passes
