"""Runs that stop before their last step: by their evaluations, or because they diverge."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

import vera_fx
from tests.recipes import tiny
from vera_fx.errors import CheckpointError, ConfigError
from vera_fx.recipes import checkpoints, trainer
from vera_fx.recipes.callbacks import Stopper
from vera_fx.recipes.train import train


def test_the_best_adapter_is_kept_and_a_killed_end_trains_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = itertools.chain([3.0, 2.0, 2.5], itertools.repeat(0.0))

    def figures(*_: Any) -> dict[str, float]:
        return {"loss": next(losses), "accuracy": 0.5, "f1": 0.5}

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(trainer, "evaluate", figures)
    recipe = tiny.recipe(
        task="classification",
        model=tiny.bert(tmp_path / "model", layers=1),
        data=tiny.jsonl(tmp_path / "data.jsonl", tiny.sentences(16)),
        held_out=4,
        batch_size=4,
        steps=9,
        evaluate_every=1,
        patience=1,
        metric="loss",
    )
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(vera_fx, "save_adapter", full)
        with pytest.raises(OSError, match="no space"):
            train(recipe, run)
    assert checkpoints.steps_of(run / "checkpoints") == [2, 3]
    held = {
        step: load_file(run / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (2, 3)
    }

    report = train(recipe, run)
    assert (report["steps"], report["best step"], report["evaluation"]["loss"]) == (3, 2, 2.0)
    found = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in held[2].items())
    assert any(not torch.equal(found[key], value) for key, value in held[3].items())


def test_what_diverges_ends() -> None:
    stopper = Stopper("loss", None, greater=False)
    state = TrainerState(global_step=7)
    stopper.on_log(None, state, TrainerControl(), logs={"loss": 0.5})
    for loss in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="diverged: at step 7.*smaller rate"):
            stopper.on_log(None, state, TrainerControl(), logs={"loss": loss})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 3')
    checkpoints.mark(folder, [])
    with pytest.raises(CheckpointError, match="checkpoint-3 is damaged.*delete it"):
        checkpoints.last(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    checkpoints.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
