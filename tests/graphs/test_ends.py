"""What is done at an object's end is no business of a compiler, in whose time Python may find it."""

import gc
from typing import Any

import torch
from torch import Tensor

from vera_fx._torch_graphs import at_end_of


class Ring:
    """Only the collector of cycles ends it."""

    def __init__(self) -> None:
        self.itself = self


def collecting(x: Tensor) -> Tensor:
    gc.collect()  # torch.compile runs it, with its callback in place
    return x + 1


def frames(counters: Any, ended: list[Any], *, rings: int) -> int:
    """How many frames Dynamo was given in a call at which so many objects end."""
    run = torch.compile(collecting, backend="eager")
    run(torch.ones(3))
    counters.clear()
    gc.disable()
    try:
        for _ in range(rings):
            at_end_of(Ring(), _end, ended, torch.ones(2))
        run(torch.ones(3))
    finally:
        gc.enable()
    return counters["frames"]["total"]


def _end(ended: list[Any], value: Tensor) -> None:
    ended.append(value * 2)


def test_nothing_of_it_is_compiled(fresh_dynamo: Any) -> None:
    ended: list[Any] = []
    without = frames(fresh_dynamo, ended, rings=0)
    assert not ended
    assert frames(fresh_dynamo, ended, rings=12) == without
    assert len(ended) == 12
