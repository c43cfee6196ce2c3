"""A second process compiles nothing anew: graphs are the same text in every process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(cache: Path, load: Path | str = "", save: Path | str = "", **environment: str) -> dict:
    """What one process found in the caches."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.graphs.warm_process", str(load), str(save)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_starts_warm(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    cold = run(tmp_path / "here", save=artifacts)
    assert cold["inductor"]["fxgraph_cache_miss"] > 0

    warm = run(tmp_path / "here")
    assert warm["inductor"]["fxgraph_cache_hit"] == cold["inductor"]["fxgraph_cache_miss"]
    assert not warm["inductor"].get("fxgraph_cache_miss")

    # torch.compiler.save_cache_artifacts carries the compiled graphs to a machine without any.
    carried = run(tmp_path / "elsewhere", load=artifacts)
    assert carried["inductor"]["fxgraph_cache_hit"] == warm["inductor"]["fxgraph_cache_hit"]
    assert not carried["inductor"].get("fxgraph_cache_miss")


@pytest.mark.slow
def test_gradients_derived_by_hand_can_be_cached_as_well(tmp_path: Path) -> None:
    """torch leaves graphs with autograd functions out of its outer cache unless it is told."""
    allowed = {"TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1"}
    cold = run(tmp_path, **allowed)
    warm = run(tmp_path, **allowed)

    assert cold["aot"]["autograd_cache_miss"] == warm["aot"]["autograd_cache_hit"] > 0
    assert not warm["aot"].get("autograd_cache_miss")
