"""A run that is killed, at whatever moment, ends in the bits of one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.recipes import tiny
from vera_fx.recipes import checkpoints
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.run_folder import RunFolder
from vera_fx.recipes.train import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Dropout, a fresh head, rows of many lengths, a ragged last batch, two epochs, accumulation."""
    root = tmp_path_factory.mktemp("resume")
    return tiny.recipe(
        task="classification",
        model=tiny.bert(root / "model", dropout=0.1, layers=1),
        data=tiny.jsonl(root / "data.jsonl", tiny.sentences(29)),
        held_out=5,
        batch_size=5,
        accumulate=2,
        epochs=3,
        evaluate_every=4,
        save_every=2,
        rate=0.05,
        metric="loss",
    )


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run that nobody killed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    return path, train(recipe, path)


def assert_same(path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    expected, found = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole[0], path)
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    figures = RunFolder(path).metrics()
    assert figures == RunFolder(whole[0]).metrics()
    assert sorted(entry.name for entry in path.iterdir() if entry.name[0] != ".") == [
        "adapter",
        "metrics.json",
        "recipe.yaml",
        "run.json",
    ]


def killed(recipe: Recipe, run: Path, cache: Path, place: str, count: int, when: str) -> None:
    """A process that trains, and is killed."""
    file = run.with_name("recipe.yaml")
    file.write_text(yaml.safe_dump(recipe.values()))
    arguments = ["train", str(run), "--recipe", str(file)]
    command = [sys.executable, "-m", "tests.recipes.kill", place, str(count), when, *arguments]
    surroundings = {**os.environ, "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_processes_go_on(
    recipe: Recipe, whole: tuple[Path, dict[str, Any]], tmp_path: Path, datasets_cache: Path
) -> None:
    """In the midst of writing the second checkpoint, and when the adapter is there but no end."""
    run = tmp_path / "run"
    killed(recipe, run, datasets_cache, "transformers:Trainer._save_rng_state", 2, "before")
    assert checkpoints.steps_of(run / "checkpoints") == [2]
    torn = run / "checkpoints" / "checkpoint-4"
    assert (torn / "optimizer.pt").exists()
    assert not (torn / "trainer_state.json").exists()
    killed(recipe, run, datasets_cache, "vera_fx:save_adapter", 1, "after")
    assert (run / "adapter" / "adapter_config.json").exists()
    assert not (run / "metrics.json").exists()

    train(recipe, run)
    assert_same(run, whole)


class Interrupt(TrainerCallback):
    """Ends training after a step, as an error would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(recipe: Recipe, run: Path, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe, run, lambda *_: [Interrupt(step)])


@pytest.mark.slow
def test_interrupted_at_any_step(
    recipe: Recipe, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Before the first checkpoint, and in the first step of an epoch."""
    assert whole[1]["steps"] == 9
    for step in (1, 4):
        interrupted(recipe, tmp_path / "run", step)
    train(recipe, tmp_path / "run")
    assert_same(tmp_path / "run", whole)
