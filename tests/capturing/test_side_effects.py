"""What a forward does beside its result is done with every call: random draws of Python's, counters."""

import random
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import fill_vectors


class Scaled(nn.Module):
    """Scales what a targeted layer gives by a number of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 5)

    def number(self) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.number()


class Python(Scaled):
    def number(self) -> float:
        return random.random()


class Numpy(Scaled):
    def number(self) -> float:
        return float(np.random.rand())


class OwnPython(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.generator: Any = random.Random(3)

    def number(self) -> float:
        return self.generator.random()


class OwnState(OwnPython):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.RandomState(3)

    def number(self) -> float:
        return self.generator.rand()


class OwnGenerator(OwnPython):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(3)


class Counting(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def number(self) -> float:
        self.calls += 1
        return float(self.calls)


class CountingLate(Scaled):
    def number(self) -> float:
        self.calls = getattr(self, "calls", 0) + 1
        return float(self.calls)


class MadeOnce(Scaled):
    """What is kept after the first call is no counter."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = 0

    def number(self) -> float:
        if not self.kept:
            self.kept = 7
        return float(self.kept)


class Seeded(Scaled):
    """Draws the same numbers with every call."""

    def number(self) -> float:
        random.seed(5)
        return random.random()


class DrawsAndBranches(Scaled):
    """No export gets past the branch, which comes after the draw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("limit", torch.zeros(()))

    def number(self) -> float:
        drawn = random.random()
        return drawn if bool(self.limit > 100) else 2 * drawn


CHANGING = [
    Python,
    Numpy,
    OwnPython,
    OwnState,
    OwnGenerator,
    Counting,
    CountingLate,
    DrawsAndBranches,
]


def seed() -> None:
    random.seed(11)
    np.random.seed(11)


def adapted(kind: type[Scaled]) -> Any:
    torch.manual_seed(0)
    config = vera_fx.VeraConfig(r=3, target_modules=["lin"], d_initial=0.5)
    model: Any = vera_fx.adapt(kind(), config)
    fill_vectors(model)
    return model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", CHANGING)
def test_every_call_has_its_own_number(kind: type[Scaled], compiled: bool) -> None:
    model, x = adapted(kind), torch.randn(2, 4)
    run = torch.compile(model) if compiled else model
    seed()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [run(x) for _ in range(3)]
    seed()
    alone = adapted(kind)
    numbers = [alone.number() for _ in range(3)]
    assert len(set(numbers)) == 3
    update = found[0] / numbers[0]
    assert not torch.allclose(update, nn.functional.linear(x, model.lin.weight, model.lin.bias))
    for value, number in zip(found, numbers, strict=True):
        torch.testing.assert_close(value, update * number)
    assert vera_fx.PartialCaptureWarning in {warning.category for warning in told}


@pytest.mark.parametrize("kind", [Python, Numpy, DrawsAndBranches])
def test_a_capture_that_fails_draws_nothing(kind: type[Scaled]) -> None:
    seed()
    with pytest.warns(vera_fx.PartialCaptureWarning):
        adapted(kind)(torch.randn(2, 4))
    after = random.getstate(), np.random.get_state()[1:]
    seed()
    adapted(kind).number()
    expected = random.getstate(), np.random.get_state()[1:]
    assert repr(after) == repr(expected)


def test_a_counter_counts() -> None:
    model = adapted(Counting)
    with pytest.warns(vera_fx.PartialCaptureWarning, match="changes the number in calls"):
        model(torch.randn(2, 4))
    for _ in range(3):
        model(torch.randn(2, 4))
    assert model.calls == 4


@pytest.mark.parametrize(("kind", "number"), [(MadeOnce, 7.0), (Seeded, random.Random(5).random())])
def test_the_same_with_every_call_is_captured(kind: type[Scaled], number: float) -> None:
    model, x = adapted(kind), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", vera_fx.PartialCaptureWarning)
        found = [model(x) for _ in range(3)]
    for value in found:
        torch.testing.assert_close(value, found[0])
    plain = nn.functional.linear(x, model.lin.weight, model.lin.bias) * number
    with vera_fx.disable_adapters(model):
        torch.testing.assert_close(model(x), plain)


def test_draws_of_other_threads_are_not_the_models() -> None:
    model, x, stop = adapted(MadeOnce), torch.randn(2, 4), threading.Event()

    def draw() -> None:
        while not stop.is_set():
            random.random()
            time.sleep(1e-4)

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", vera_fx.PartialCaptureWarning)
            model(x)
    finally:
        stop.set()
        drawing.join()


def test_draws_of_torch_are_made_anew() -> None:
    class Torch(Scaled):
        def number(self) -> Any:
            return torch.rand(())

    model, x = adapted(Torch), torch.randn(2, 4)
    assert not torch.allclose(model(x), model(x))
