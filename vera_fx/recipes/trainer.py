"""Transformers' Trainer for a recipe: its optimiser, its loss, its evaluation, its arguments."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW

import vera_fx
from vera_fx.bank.bank import bank_of
from vera_fx.recipes.data import Rows
from vera_fx.recipes.evaluation import evaluate
from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.tasks.protocol import Batch, Task

_HEAD = 0.4
"""The head's rate as a share of the vectors'."""

Shapes = list[list[tuple[str, list[int], str]]]


class RecipeTrainer(transformers.Trainer):
    """A Trainer whose losses and figures are a task's.

    Attributes:
        shapes: of the batches that were seen, in the order of their first times.
        seen: how many tokens, or rows that have none, went through the model.
        unit: which of the two.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        rows: tuple[Rows, Rows | None],
        folder: Path,
        shapes: Shapes,
    ) -> None:
        steps = Steps(recipe, len(rows[0]))
        super().__init__(
            model=model,
            args=arguments(recipe, steps, folder, evaluates=rows[1] is not None),
            train_dataset=rows[0],
            eval_dataset=rows[1],
            data_collator=task.batch,
            optimizers=(_optimizer(model, recipe), None),  # type: ignore[arg-type]  # None is allowed
        )
        self._adapted, self._task, self._recipe, self._held = model, task, recipe, rows[1]
        self.model_accepts_loss_kwargs = task.by_tokens
        self.loss_is_scaled_for_ga = task.by_tokens
        self.shapes = shapes
        self.seen, self.unit = 0, "rows"

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss."""
        del return_outputs
        shape = shape_of(inputs)
        if shape not in self.shapes:
            self.shapes.append(shape)
        ids = inputs.get("input_ids")
        self.unit = "rows" if ids is None else "tokens"
        self.seen += len(next(iter(inputs.values()))) if ids is None else ids.numel()
        return self._task.loss(model, dict(inputs), num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The task's figures over the rows that were held out."""
        del args, kwargs
        found = evaluate(self._adapted, self._task, self._held, self._recipe.batch_size)
        logs = {f"eval_{name}": value for name, value in found.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs


def shape_of(batch: Batch) -> list[tuple[str, list[int], str]]:
    """What of a batch decides how it is computed."""
    return [
        (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in batch.items()
        if name != "labels"
    ]


def replay(model: nn.Module, task: Task, shapes: Sequence[Any]) -> None:
    """Let a resumed run plan its graphs as the run before it did.

    Which plans a batch gets may depend on the graphs that earlier batches left, and other plans
    round otherwise.
    """
    device = next(model.parameters()).device
    model.train()
    for shape in shapes:
        batch = {
            name: torch.full(sizes, int("mask" in name), dtype=getattr(torch, dtype), device=device)
            for name, sizes, dtype in shape
        }
        vera_fx.capture(model, **batch, **task.call)


class Steps:
    """How many steps a recipe takes.

    Attributes:
        total: all of them.
        evaluate_every: and after how many there is an evaluation.
        save_every: and a checkpoint.
    """

    def __init__(self, recipe: Recipe, rows: int) -> None:
        epoch = math.ceil(math.ceil(rows / recipe.batch_size) / recipe.accumulate)
        self.total = recipe.steps or math.ceil(epoch * recipe.epochs)
        self.evaluate_every = recipe.evaluate_every or min(epoch, self.total)
        self.save_every = recipe.save_every or self.evaluate_every


def arguments(
    recipe: Recipe, steps: Steps, folder: Path, *, evaluates: bool
) -> transformers.TrainingArguments:
    """Trainer's arguments for a recipe."""
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        max_steps=steps.total,
        learning_rate=recipe.rate,
        lr_scheduler_type=recipe.schedule
        if recipe.schedule != "constant"
        else "constant_with_warmup",
        warmup_steps=round(recipe.warmup * steps.total),
        max_grad_norm=recipe.clip,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=steps.save_every,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=steps.evaluate_every,
        seed=recipe.seed,
        data_seed=recipe.seed,
        report_to=[],
        disable_tqdm=True,
        use_cpu=recipe.device == "cpu",
        torch_compile=recipe.compile,
        activation_checkpointing=recipe.checkpointing,
        remove_unused_columns=False,
        dataloader_pin_memory=recipe.device != "cpu" and torch.cuda.is_available(),
    )


def _optimizer(model: nn.Module, recipe: Recipe) -> AdamW:
    """AdamW with one rate for the vectors, and another for modules that train in full."""
    bank = bank_of(model)
    vectors = {id(p) for name in bank.adapters for p in bank.adapter(name).vectors.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = recipe.rate * _HEAD if recipe.head_rate is None else recipe.head_rate
    groups = [
        {"params": [p for p in trained if id(p) in vectors], "lr": recipe.rate},
        {"params": [p for p in trained if id(p) not in vectors], "lr": rate},
    ]
    return AdamW([group for group in groups if group["params"]], weight_decay=recipe.weight_decay)
