"""What a job's neighbours in the batch are changes nothing of it: not a bit, where the batch has the same shape."""

from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.training.jobs import classifier, config, examples, trained
from vera_fx import TrainSettings

NAMES = ("one", "two", "three", "four", "five", "six", "seven", "eight")
HEADS = {"modules_to_save": ["classifier"], "bias": "vera_only"}


def like(data: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Other tokens and labels, in rows of the same lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            **example,
            "input_ids": torch.randint(1, 30, example["input_ids"].shape, generator=generator),
            "labels": (example["labels"] + seed) % 3,
        }
        for example in data
    ]


def mix(seed: int) -> dict[str, Any]:
    """Eight jobs; the first is always the same, all others depend on ``seed``."""
    data, found = examples(12, 1), {}
    for at, name in enumerate(NAMES):
        other = seed * at
        rate = 0.02 if at == 0 else 0.01 * (1 + (seed * at) % 7)
        settings = TrainSettings(steps=6, batch_size=2, shuffle=False, lr=rate, max_norm=0.5)
        found[name] = (config(**HEADS), like(data, other) if other else data, settings)
    return found


def ends(seed: int, *, compiled: bool) -> dict[str, torch.Tensor]:
    """Where the first job of a mix ends, and where another does."""
    model: nn.Module = classifier()
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    results = vera_fx.train_many(call, mix(seed), progress=False)
    assert all(results[name].status == "finished" for name in NAMES)
    return {**trained(model, "one"), **{f"other {k}": v for k, v in trained(model, "two").items()}}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_others_change_no_bit(compiled: bool) -> None:
    torch._dynamo.reset()
    first, second = ends(1, compiled=compiled), ends(5, compiled=compiled)
    for name, value in first.items():
        if name.startswith("other "):
            assert not torch.equal(second[name], value), name
        else:
            assert torch.equal(second[name], value), name
    start = trained(vera_fx.adapt(classifier(), config(**HEADS), adapter_name="one"), "one")
    assert all((first[name] - value).abs().max() > 1e-3 for name, value in start.items())
