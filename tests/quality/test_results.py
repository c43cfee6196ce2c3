"""Runs are appended, a killed one is done again and no other, and rates are chosen by validation alone."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import grid
from benchmarks.quality.results import append, chosen, read


def test_a_line_cut_short_is_left_out_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "runs.jsonl"
    append(path, {"a": {"x": 1}, "b": {"x": 2}})
    path.write_bytes(path.read_bytes() + b'{"key": "c", "res')
    assert read(path) == {"a": {"x": 1}, "b": {"x": 2}}
    append(path, {"c": {"x": 3}})
    assert read(path) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}
    path.write_bytes(b'{"key"')
    append(path, {"d": {"x": 4}})
    assert read(path) == {"d": {"x": 4}}


def swept(method: str, lr: float, accuracy: float, loss: float, **fields: Any) -> dict[str, Any]:
    plain = {"stage": "sweep", "task": "movies", "method": method, "lr": lr}
    return {**plain, "accuracy": accuracy, "loss": loss, **fields}


def test_rates_are_chosen_by_accuracy_then_loss_and_images_apart() -> None:
    rows = [
        swept("a", 1e-3, 0.8, 0.5), swept("a", 1e-2, 0.9, 0.6), swept("a", 1e-1, 0.9, 0.4),
        swept("b", 1e-3, 0.7, 0.5), swept("b", 1e-2, 0.6, 0.1),
        swept("a", 1e-3, 0.99, 0.1, task="digits"),
        swept("b", 1e-2, 1.0, 0.0, stage="text"),
    ]  # fmt: skip
    found = chosen({str(at): row for at, row in enumerate(rows)})
    assert found == {(False, "a"): 1e-1, (False, "b"): 1e-3, (True, "a"): 1e-3}


def test_tables_wait_for_the_whole_sweep() -> None:
    first = list(grid.jobs({}))
    keys = [key for job in first for key in job.keys]
    assert len(keys) == len(set(keys))
    assert {key.split(" | ")[0] for key in keys} == {"labels", "sweep", "alone"}
    rates = {"accuracy": 0.5, "loss": 0.5, "part": "validation"}
    done = {
        key: {**rates, "stage": stage, "task": task, "method": name, "lr": float(lr[3:])}
        for key in keys
        for stage, task, name, lr, _ in [key.split(" | ")]
    }
    assert len(list(grid.jobs({k: done[k] for k in keys[:-1]}))) == len(first)
    everything = [key for job in grid.jobs(done) for key in job.keys]
    assert len(everything) == len(set(everything)) > 200
    tables = [key for key in everything if key not in done]
    without_seed = [key.rpartition(" | ")[0] for key in tables]
    assert {without_seed.count(name) for name in without_seed} == {5}


def job(name: str, done: list[str], work: Callable[[], Any] | None = None) -> grid.Job:
    def do() -> dict[str, dict[str, Any]]:
        done.append(name)
        return {name: {"accuracy": 0.5}}

    return grid.Job((name,), work or do)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The work is done in this process, so that the test sees it."""
    monkeypatch.setattr(command, "apart", lambda work: work())
    return []


def test_what_is_done_is_not_done_again(
    done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.jsonl"
    monkeypatch.setattr(command, "slice_jobs", lambda: [job(name, done) for name in "abc"])
    append(path, {"b": {"accuracy": 0.1}})
    command.main(output=path, slice_only=True)
    assert done == ["a", "c"]
    command.main(output=path, slice_only=True)
    assert done == ["a", "c"]
    assert set(read(path)) == {"a", "b", "c"}


def test_time_is_kept(done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 31.0, 61.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(command, "slice_jobs", lambda: [job(name, done) for name in "abc"])
    command.main(minutes=1, output=tmp_path / "runs.jsonl", slice_only=True)
    assert done == ["a", "b"]


def test_a_run_is_a_process_of_its_own() -> None:
    import os

    here: list[int] = []
    found = command.apart(lambda: here.append(1) or {"pid": {"accuracy": os.getpid()}})  # type: ignore[func-returns-value]
    assert found["pid"]["accuracy"] != os.getpid()
    assert not here
    with pytest.raises(RuntimeError, match="without a result"):
        command.apart(lambda: os._exit(3))


@pytest.mark.slow
def test_the_slice_runs_from_the_command_line(tmp_path: Path) -> None:
    """Half a minute: a base trained from scratch, two rates in one batch, two methods alone."""
    path = tmp_path / "runs.jsonl"
    command_line = [sys.executable, "-m", "benchmarks.quality", "--slice", "--output", str(path)]
    subprocess.run(command_line, check=True, cwd=Path(__file__).parents[2])
    found = read(path)
    assert [run["method"] for run in found.values()] == [
        "VeRA r=64",
        "VeRA r=64",
        "head",
        "LoRA r=8",
    ]
    commoner = 0.25
    assert all(run["accuracy"] > commoner for run in found.values())
    assert len({run["predictions"][:100] for run in found.values()}) == 4
