"""`train_many` in two processes: every job ends where it ends in one process on the whole batches."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

import vera_fx
from tests.distributed.pair import WORLD, two_processes
from tests.distributed.test_fsdp2_files import shared
from tests.training.jobs import assert_trained_alike, classifier, config, examples, trained
from tests.training.test_many import JOBS
from vera_fx import TrainSettings

HELD_OUT = {"plain": examples(50, 9), "warm": examples(3, 11), "lonely": examples(1, 4)}
LONELY = (
    config(),
    examples(20, 13),
    TrainSettings(steps=6, batch_size=1, lr=0.03, evaluate_every=2),
)
"""One row a step, which only one of the processes has."""


def own_group() -> Any:
    """A group of this process alone, in which it does the whole work."""
    return [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]


def jobs() -> dict[str, Any]:
    return {**JOBS, "lonely": LONELY}


def run(model: nn.Module, chosen: Any = None, **options: Any) -> vera_fx.TrainResults:
    options = {"progress": False, "held_out": HELD_OUT, **options}
    return vera_fx.train_many(model, jobs() if chosen is None else chosen, **options)


def assert_equal_everywhere(model: nn.Module, names: Any) -> None:
    """To the bit: what one process sees, all see."""
    for name in names:
        for key, value in trained(model, name).items():
            others = [torch.empty_like(value) for _ in range(WORLD)]
            dist.all_gather(others, value.contiguous())
            assert all(torch.equal(other, value) for other in others), f"{name} {key}"


@two_processes
def test_jobs_end_where_they_end_in_one_process() -> None:
    """Jobs of other sizes, some of which end early; in the last steps one job's rows are few."""
    one, two = classifier(), classifier()
    expected = run(one, group=own_group())
    found = run(two)
    assert_equal_everywhere(two, jobs())
    for name in jobs():
        assert_trained_alike(trained(two, name), trained(one, name))
        this, that = found[name], expected[name]
        assert (this.status, this.step, this.tokens) == (that.status, that.step, that.tokens)
        assert this.loss == pytest.approx(that.loss, rel=1e-3)
        assert (this.held_out is None) == (name not in HELD_OUT)
        if name in HELD_OUT:
            assert this.held_out == pytest.approx(that.held_out, rel=1e-3)
            assert this.accuracy == that.accuracy
    assert expected.passes < found.passes <= WORLD * expected.passes
    assert expected.writes
    assert found.writes == (dist.get_rank() == 0)


@two_processes
def test_more_processes_than_rows() -> None:
    """The other process has no row in any step, and none of the held-out ones."""
    one, two = classifier(), classifier()
    held_out = {"lonely": HELD_OUT["lonely"]}
    expected = run(one, {"lonely": LONELY}, held_out=held_out, group=own_group())
    found = run(two, {"lonely": LONELY}, held_out=held_out)
    assert_equal_everywhere(two, ["lonely"])
    assert_trained_alike(trained(two, "lonely"), trained(one, "lonely"), bound=1e-6)
    assert found["lonely"].accuracy == expected["lonely"].accuracy is not None
    assert found.passes == expected.passes
