"""What the fields of a recipe may be, and what their flags are called, take and say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_fx.recipes import checks
from vera_fx.recipes.checks import Check, maybe, number, one_of, whole
from vera_fx.recipes.tasks.pooling import POOLINGS

TASKS = ("classification", "causal-lm", "embeddings", "images")
PLANS = ("auto", "memory", "factored", "scaled", "merged", "dense")


@dataclass(frozen=True)
class Spec:
    """One field.

    Attributes:
        kind: what its flag takes; None for a field without one.
        check: takes its name and a value, and gives the value as it is kept.
        text: the flag's help.
        flags: what the flag is called, if not as the field.
    """

    kind: Any
    check: Check
    text: str
    flags: tuple[str, ...] = ()


_positive = number(0, above=True)
_words = list[str]

SPECS: dict[str, Spec] = {
    "task": Spec(str, one_of(*TASKS), ", ".join(TASKS)),
    "model": Spec(Path, checks.path, "folder of a transformers model"),
    "data": Spec(
        Path, checks.path, "file (JSONL, CSV, TSV, Parquet) or folder (datasets', images)"
    ),
    "eval_data": Spec(Path, maybe(checks.path), "data to evaluate on; else a part of data"),
    "held_out": Spec(float, number(0), "share of data, or number of rows, to evaluate on"),
    "columns": Spec(_words, checks.texts_by_text, "name=column, repeated", ("--column",)),
    "turns": Spec(str, one_of("all", "last"), "of the assistant, to learn: all or last"),
    "pooling": Spec(str, maybe(one_of(*POOLINGS)), "of embeddings; else the model's own, or mean"),
    "temperature": Spec(float, _positive, "of the loss of embeddings"),
    "adapter": Spec(str, one_of("vera", "dvora"), "vera or dvora"),
    "rank": Spec(int, whole(1), "of the adapter", ("--rank", "-r")),
    "targets": Spec(
        _words,
        maybe(checks.names),
        "module to adapt, repeated; else the architecture's",
        ("--target", "-t"),
    ),
    "plan": Spec(str, one_of(*PLANS), f"how branches are computed: {', '.join(PLANS)}"),
    "options": Spec(None, checks.mapping, "further fields of the adapter's configuration"),
    "epochs": Spec(float, _positive, "passes through the data"),
    "steps": Spec(int, maybe(whole(1)), "of the optimiser, instead of epochs"),
    "batch_size": Spec(int, whole(1), "rows in a batch"),
    "accumulate": Spec(int, whole(1), "batches in a step"),
    "length": Spec(
        int,
        whole(2),
        "longest row in tokens; longer ones are cut, and those the model has no positions for",
    ),
    "rate": Spec(float, _positive, "learning rate of the vectors"),
    "head_rate": Spec(float, maybe(number(0)), "learning rate of a head; else 0.4 of rate"),
    "warmup": Spec(float, number(0, 1), "share of steps in which rates rise"),
    "schedule": Spec(
        str,
        one_of("linear", "cosine", "constant"),
        "of rates after that: linear, cosine, constant",
    ),
    "weight_decay": Spec(float, number(0), "of AdamW"),
    "clip": Spec(float, number(0), "largest norm of the gradients; 0 for none"),
    "seed": Spec(int, whole(0), "of the head, the order and the dropout"),
    "dtype": Spec(
        str,
        one_of("float32", "bfloat16", "float16", "auto"),
        "of the base's weights; auto: as saved",
    ),
    "device": Spec(str, one_of("auto", "cpu"), "auto or cpu"),
    "checkpointing": Spec(bool, checks.flag, "compute layers again in backward, for memory"),
    "compile": Spec(bool, checks.flag, "compile the model"),
    "evaluate_every": Spec(int, maybe(whole(1)), "steps; else once an epoch"),
    "save_every": Spec(int, maybe(whole(1)), "steps; else with every evaluation"),
    "log_every": Spec(int, whole(1), "steps"),
    "patience": Spec(
        int, maybe(whole(1)), "evaluations without a better one after which training stops"
    ),
    "metric": Spec(str, maybe(lambda _, value: str(value)), "to be best in; else the task's"),
    "tensorboard": Spec(bool, checks.flag, "write figures for TensorBoard"),
}
"""Every field of a `Recipe`."""
