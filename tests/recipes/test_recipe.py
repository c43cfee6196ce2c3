"""Recipes from files and flags: every field is checked, nothing is guessed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import tiny
from vera_fx.errors import ConfigError
from vera_fx.recipes import checkpoints
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.recipe_fields import SPECS
from vera_fx.recipes.run_folder import RunFolder
from vera_fx.recipes.trainer import Steps

NEEDED: dict[str, Any] = {"task": "images", "model": "m", "data": "d"}


def test_every_field_has_a_check() -> None:
    assert [entry.name for entry in dataclasses.fields(Recipe)] == list(SPECS)


def test_flags_win_over_a_file_whose_paths_are_its_own(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "task: causal-lm\nmodel: ../m\ndata: d.csv\nbatch-size: 4\nrate: 1e-3\nseed: 5\n"
        "columns: {text: body}\ntargets: [q, v]\n"
    )
    found = Recipe.read(file, {"seed": 7, "rank": None, "columns": ["text=words"]})
    assert (found.task, found.batch_size, found.rate, found.seed) == ("causal-lm", 4, 1e-3, 7)
    assert found.model == tmp_path / ".." / "m"
    assert found.data == tmp_path / "d.csv"
    assert (found.rank, found.columns, found.targets) == (256, {"text": "words"}, ("q", "v"))
    again = Recipe.read(None, found.values())
    assert again == found


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "image"}, "did you mean 'images'"),
        ({"rnk": 4}, "did you mean 'rank'"),
        ({"rank": 0}, "rank must be a whole number of at least 1"),
        ({"rank": True}, "rank"),
        ({"rate": 0}, "rate must be above 0"),
        ({"rate": "fast"}, "rate must be a finite number"),
        ({"rate": float("nan")}, "rate"),
        ({"warmup": 1.5}, "at most 1"),
        ({"compile": 1}, "compile must be True or False"),
        ({"columns": ["text"]}, "name=column"),
        ({"columns": {"text": 3}}, "columns"),
        ({"targets": []}, "targets"),
        ({"options": [1]}, "options"),
        ({"plan": "timed"}, "plan"),
        ({"model": ""}, "model must be a path"),
    ],
)
def test_wrong_values(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe.read(None, {**NEEDED, **fields})


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match="r.yaml"):
        Recipe.read(tmp_path / "r.yaml", {})


def test_a_folder_is_one_recipes(tmp_path: Path) -> None:
    data = tiny.jsonl(tmp_path / "d.jsonl", [{"text": "a"}])
    (tmp_path / "m").mkdir()
    first = tiny.recipe(task="causal-lm", model=tmp_path / "m", data=data, seed=1)
    folder = RunFolder(tmp_path / "run")
    with folder.held():
        folder.begin(dataclasses.replace(first, seed=3))
        folder.learn(first, {"form": ["wrong"]})
        folder.begin(first)
        assert folder.facts() is None, "a recipe that trained nothing may be corrected"
        folder.learn(first, {"form": ["text"]})
        folder.end({})
        folder.begin(first)
        folder.check_sources(first)
        with pytest.raises(ConfigError, match="seed was 1 and is 2"):
            folder.begin(dataclasses.replace(first, seed=2))
        with pytest.raises(ConfigError, match="another process"), folder.held():
            pass
    assert (folder.recipe(), folder.facts()) == (first, {"form": ["text"]})
    data.write_text('{"text": "b"}\n')
    with pytest.raises(ConfigError, match="data"):
        folder.check_sources(first)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="other things"), RunFolder(tmp_path / "other").held():
        pass


def test_steps() -> None:
    def steps(rows: int, **fields: Any) -> tuple[int, int, int]:
        made = Steps(Recipe.read(None, {**NEEDED, **fields}), rows)
        return made.total, made.evaluate_every, made.save_every

    assert steps(33, batch_size=4, accumulate=2, epochs=2) == (10, 5, 5)
    assert steps(33, batch_size=4, steps=3) == (3, 3, 3)
    assert steps(33, batch_size=4, epochs=0.5, evaluate_every=4, save_every=2) == (5, 4, 2)


LOG = [
    {"step": 1, "loss": 9.0},
    {"step": 2, "eval_accuracy": 0.5, "eval_loss": 3.0},
    {"step": 4, "eval_accuracy": 0.7, "eval_loss": 2.0},
    {"step": 6, "eval_accuracy": 0.7, "eval_loss": 1.0},
    {"step": 8, "eval_accuracy": float("nan"), "eval_loss": 0.5},
    {"step": 10, "eval_accuracy": 0.6, "eval_loss": 0.7},
]


def test_the_best_step() -> None:
    assert checkpoints.best_step(LOG, "accuracy", greater=True) == 6
    assert checkpoints.best_step(LOG, "loss", greater=False) == 8
    assert checkpoints.best_step(LOG[:1], "loss", greater=False) is None
    assert not checkpoints.is_stale(LOG, "accuracy", 3, greater=True)
    assert checkpoints.is_stale(LOG, "accuracy", 2, greater=True)
    assert not checkpoints.is_stale(LOG, "accuracy", None, greater=True)
