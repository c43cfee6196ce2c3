"""From a recipe and a folder to an adapter, in one go or in as many as it takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback

import vera_fx
from vera_fx.errors import ConfigError, listing
from vera_fx.recipes import checkpoints, data
from vera_fx.recipes.callbacks import Keeper, Stopper
from vera_fx.recipes.data import EVAL, TRAIN, Rows
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.run_folder import RunFolder
from vera_fx.recipes.tasks.kinds import kind_of
from vera_fx.recipes.tasks.protocol import Task
from vera_fx.recipes.trainer import RecipeTrainer, Steps, replay

Watcher = Callable[[Steps, int, RecipeTrainer], Sequence[Any]]
"""Makes Trainer's callbacks that show progress, from the steps, the first of them, and the trainer."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to train: its task, its rows, and its figure to be best in."""

    recipe: Recipe
    task: Task
    train: Rows
    held: Rows | None
    metric: str
    greater: bool


def train(recipe: Recipe, path: Path, watch: Watcher | None = None) -> dict[str, Any]:
    """Train by a recipe in a folder; go on if a run of the recipe is there.

    A run that was killed at any moment goes on from its last whole checkpoint, and ends in the same
    numbers as one that was not (on a CPU to the bit, uncompiled).

    Args:
        recipe: what to do.
        path: the run's folder.
        watch: shows progress.

    Returns:
        What the run came to, as ``metrics.json`` says it.

    Raises:
        ConfigError: the recipe, the model or the data cannot be used, or the folder is another
            recipe's. What was trained up to there stays.
        CheckpointError: the last checkpoint was damaged.
    """
    folder = RunFolder(path.absolute())
    with folder.held():
        folder.begin(recipe)
        folder.check_sources(recipe)
        if folder.metrics() is None:
            folder.end(_train(prepare(recipe, folder), folder, watch))
        if folder.checkpoints.is_dir():
            checkpoints.sweep(folder.checkpoints, keep=())
            folder.checkpoints.rmdir()
        return {**(folder.metrics() or {}), "adapter": str(folder.adapter)}


def prepare(recipe: Recipe, folder: RunFolder) -> Prepared:
    """Read the data and make the task.

    Raises:
        ConfigError: either is not possible.
    """
    _check_devices(recipe)
    train_rows, held = rows_of(recipe)
    kind, facts = kind_of(recipe), folder.facts()
    task = kind.from_rows(recipe, train_rows) if facts is None else kind.from_facts(recipe, facts)
    metric = recipe.metric or task.best
    if metric not in task.figures:
        raise ConfigError(
            f"metric must be one of {', '.join(task.figures)} for {recipe.task}, got {metric!r}"
        )
    ready = Prepared(recipe, task, train_rows, held, metric, task.figures[metric])
    _check_steps(ready)
    if facts is None:
        folder.learn(recipe, task.facts())
    return ready


def rows_of(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """The rows to train on and those to evaluate on, with the task's columns."""
    found = data.read(recipe.data)
    held = data.read(recipe.eval_data)[TRAIN] if recipe.eval_data else found.get(EVAL)
    rows = for_task(recipe, found[TRAIN])
    if held is None:
        return data.split(rows, recipe.held_out, recipe.seed)
    return rows, for_task(recipe, held)


def for_task(recipe: Recipe, rows: Rows) -> Rows:
    """Rows with the columns that the recipe's task trains on, as it takes them."""
    kind = kind_of(recipe)
    wanted = kind.columns(canonical(recipe.columns, rows.column_names))
    return kind.prepared(data.with_columns(rows, wanted, recipe.columns))


def canonical(called: Mapping[str, str], there: Sequence[str]) -> list[str]:
    """What the columns that are there are called by tasks."""
    return [*there, *(name for name, column in called.items() if column in there)]


def _check_devices(recipe: Recipe) -> None:
    count = torch.cuda.device_count() if recipe.device == "auto" else 0
    if count > 1:
        raise ConfigError(
            f"a run takes one device, and {count} are there; choose one with CUDA_VISIBLE_DEVICES=0"
        )


def _check_steps(ready: Prepared) -> None:
    steps = Steps(ready.recipe, len(ready.train))
    if ready.held is not None and steps.evaluate_every % steps.save_every:
        raise ConfigError(
            f"evaluate_every ({steps.evaluate_every}) must be a multiple of save_every "
            f"({steps.save_every}), so that the best evaluation has a checkpoint"
        )
    if ready.held is None and ready.recipe.patience is not None:
        raise ConfigError("patience needs evaluations: give eval_data or held_out")


def _train(ready: Prepared, folder: RunFolder, watch: Watcher | None) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; save the adapter."""
    recipe, root = ready.recipe, folder.checkpoints
    if root.is_dir():
        checkpoints.sweep(root)
    model = adapted(recipe, ready.task)
    stopper = Stopper(ready.metric, recipe.patience, greater=ready.greater)
    steps, known = Steps(recipe, len(ready.train)), checkpoints.last(root)
    shapes = list(known.shapes) if known else []
    rows = (ready.train, ready.held)
    trainer = RecipeTrainer(model, ready.task, recipe, rows, root, shapes)
    if known is None or not (known.step >= steps.total or stopper.is_over(known.history)):
        replay(model, ready.task, shapes)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Keeper(root, ready.metric, greater=ready.greater, shapes=shapes))
        trainer.add_callback(stopper)
        begun = known.step if known else 0
        shown = () if watch is None else watch(steps, begun, trainer)
        for callback in (*_tensorboard(recipe, folder, begun), *shown):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(known.folder) if known else None)
    return _finish(ready, folder, model)


def adapted(recipe: Recipe, task: Task) -> Any:
    """The base model with a new adapter.

    Raises:
        ConfigError: the adapter's options are no fields of its configuration.
        TargetError: its targets are not there, or none are given and none are known.
        ConfigError: something beside the vectors would train in float16.
    """
    base = task.load()
    kind = vera_fx.VeraConfig if recipe.adapter == "vera" else vera_fx.DVoraConfig
    fields = {
        "r": recipe.rank,
        "target_modules": recipe.targets,
        "plan": recipe.plan,
        "task_type": task.task_type,
        "modules_to_save": task.trained_modules(base) or None,
        **recipe.options,
    }
    try:
        config = kind(**fields)
    except TypeError as error:
        raise ConfigError(f"options are no fields of {kind.__name__}: {error}") from error
    model = vera_fx.adapt(base.model, config)
    _check_dtypes(model)
    return model


def _check_dtypes(model: nn.Module) -> None:
    """Refuse heads and biases in float16: AdamW's epsilon and squares of small gradients are 0 there."""
    half = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise ConfigError(
            f"{listing(half, limit=2)} would train in float16, where AdamW divides zero by zero within "
            "steps, with PEFT as well; give dtype: bfloat16 or float32, or a model folder with a trained "
            "head (the adapter's vectors are float32 over every base)"
        )


def _tensorboard(recipe: Recipe, folder: RunFolder, begun: int) -> Sequence[Any]:
    """TensorBoard's callback; what a killed run wrote past its last checkpoint is hidden."""
    if not recipe.tensorboard:
        return ()
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback
    except ImportError as error:
        raise ConfigError(
            "tensorboard is not installed; pip install 'vera-fx[train]', or give --no-tensorboard"
        ) from error
    return (TensorBoardCallback(SummaryWriter(str(folder.tensorboard), purge_step=begun + 1)),)


def _finish(ready: Prepared, folder: RunFolder, model: nn.Module) -> dict[str, Any]:
    """Take the best checkpoint, or the last; save its adapter and say what it is worth."""
    last = checkpoints.last(folder.checkpoints)
    if last is None:
        raise ConfigError(f"training ended without a checkpoint in {folder.checkpoints}")
    best = checkpoints.best_step(last.history, ready.metric, greater=ready.greater)
    chosen = last.step if best is None else best
    checkpoints.load_weights(model, checkpoints.at(folder.checkpoints, chosen))
    vera_fx.save_adapter(model, folder.adapter)
    found = [_figures(ready, entry) for entry in last.history if f"eval_{ready.metric}" in entry]
    return {
        "task": ready.recipe.task,
        "steps": last.step,
        "best step": chosen,
        "rows": {
            "train": len(ready.train),
            "held out": 0 if ready.held is None else len(ready.held),
        },
        "trainable": vera_fx.parameter_summary(model).trainable,
        "evaluation": next((figures for figures in found if figures["step"] == chosen), None),
        "evaluations": found,
    }


def _figures(ready: Prepared, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation out of the log."""
    return {"step": entry["step"], **{name: entry[f"eval_{name}"] for name in ready.task.figures}}
