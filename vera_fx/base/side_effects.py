"""What a forward does beside its result, and a graph would not do again: draws of Python's, counters.

A graph draws torch's numbers anew with every call. Numbers from `random` or ``numpy.random`` are
constants of its trace, and so is what Python counts in a module's attribute.
"""

import contextlib
import pickle
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

Counts = Mapping[tuple[str, str], float]
"""Numbers in attributes, by the path of a module and a name."""


class Draws:
    """The states of Python's and NumPy's generators, and of those that a model's modules hold."""

    def __init__(self, model: nn.Module) -> None:
        held = {id(v): v for m in model.modules() for v in m.__dict__.values()}
        self._python = [v for v in held.values() if isinstance(v, random.Random)]
        self._arrays = [v for v in held.values() if isinstance(v, np.random.RandomState)]
        self._bits = [v.bit_generator for v in held.values() if isinstance(v, np.random.Generator)]

    def states(self) -> Any:
        """All states, as they are now: Python's, and NumPy's."""
        own = [generator.getstate() for generator in self._python]
        arrays = [generator.get_state() for generator in self._arrays]
        bits = [generator.state for generator in self._bits]
        return (random.getstate(), own), (np.random.get_state(), arrays, bits)

    def restore(self, states: Any) -> None:
        """Put states back."""
        (python, own), (numpy, arrays, bits) = states
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(self._python, own, strict=True):
            generator.setstate(state)
        for generator, state in zip(self._arrays, arrays, strict=True):
            generator.set_state(state)
        for generator, state in zip(self._bits, bits, strict=True):
            generator.state = state


class SideEffects:
    """Notes what forwards of a model do beside their results.

    Attributes:
        drawn: True once a forward left another state of a generator than it found; if `sure`, its own
            thread has to have asked Python's for numbers as well, as others may draw meanwhile. (Calls
            of NumPy's are seen by no profile.)
        counted: numbers that a forward left in attributes, other than it found them.
        sure: look which functions the thread calls, which takes a trace twice as long.
    """

    def __init__(self, model: nn.Module) -> None:
        self.drawn = self.sure = False
        self.counted: dict[tuple[str, str], float] = {}
        self._draws = Draws(model)

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """If the block fails, all generators are in the states that they were in: Python will draw anew."""
        before = self._draws.states()
        try:
            yield
        except BaseException:
            self._draws.restore(before)
            raise

    @contextlib.contextmanager
    def noted(self, model: nn.Module) -> Iterator[None]:
        """Note what the block does; it runs a forward of ``model``."""
        states, numbers = _packed(self._draws), _numbers(model)
        with _asked() if self.sure else contextlib.nullcontext([True]) as asked:
            yield
        python, numpy = (new != old for new, old in zip(_packed(self._draws), states, strict=True))
        self.drawn |= numpy or (python and bool(asked))
        found = _numbers(model)
        self.counted.update({k: v for k, v in found.items() if not _same(numbers.get(k), v)})


def _packed(draws: Draws) -> list[bytes]:
    return list(map(pickle.dumps, draws.states()))


@contextlib.contextmanager
def _asked() -> Iterator[list[bool]]:
    """Something for every call of a method of Python's generators in this thread, inside the block."""
    found: list[bool] = []
    before = sys.getprofile()

    def see(frame: Any, event: Any, called: Any) -> None:
        if before is not None:
            before(frame, event, called)
        if event == "c_call" and isinstance(getattr(called, "__self__", None), random.Random):
            found.append(True)

    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _same(old: float | None, new: float) -> bool:
    return old is new or old == new  # the former for NaN


def _numbers(model: nn.Module) -> dict[tuple[str, str], float]:
    # Not sizes that are open: they are the call's own, and another call's are another graph's.
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if type(value) in {int, float}
    }


def set_numbers(model: nn.Module, numbers: Counts) -> None:
    """Give attributes the numbers."""
    for (path, name), value in numbers.items():
        model.get_submodule(path).__dict__[name] = value
