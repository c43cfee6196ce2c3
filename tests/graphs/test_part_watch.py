"""Each part watches itself alone, and the whole model where its code knows of modules elsewhere."""

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.caching.test_equal_parts import Branching, Layer, X, adapted, assert_right, by_hooks
from tests.helpers import assert_close, assert_far_apart
from vera_fx.capturing.state_watch import StateWatch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with pytest.warns(vera_fx.PartialCaptureWarning):
        yield


class Knows(Layer):
    """Reads a flag of a module that is not inside of it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.others: list[nn.Module] = []

    def scale(self) -> float:
        return self.others[0].factor if self.others else 0.5  # type: ignore[return-value]


class Tables(Layer):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.table = np.full(1, 0.5)

    def scale(self) -> float:
        return float(self.table[0])


HOLDER = nn.Module()


class ByGlobal(Layer):
    def scale(self) -> float:
        return HOLDER.model.factor  # type: ignore[return-value, union-attr]


def watched(model: nn.Module, path: str) -> set[nn.Module]:
    """The modules that a call of a part looks through."""
    return set(model._vera_runtime.entries[path].watch._named.values())  # type: ignore[union-attr]


def test_a_part_looks_at_itself_alone() -> None:
    model = adapted(Branching())
    assert_right(model)
    assert watched(model, "layers.2") == set(model.layers[2].modules())  # type: ignore[union-attr]


def test_modules_elsewhere_that_a_part_knows_of() -> None:
    base = Branching(Knows)
    base.bystander = nn.Identity()
    base.bystander.factor = 0.5
    for layer in base.layers[1:]:
        layer.others.append(base.bystander)
    model = adapted(base)
    assert_right(model)
    before = model(X)
    model.bystander.factor = 3.0
    assert_right(model)
    assert_far_apart(model(X), before)
    model.bystander.factor = 0.5
    assert_close(model(X), before)
    assert watched(model, "layers.0") == set(model.layers[0].modules())  # type: ignore[union-attr]
    assert model.bystander in watched(model, "layers.1")


def test_a_part_that_comes_to_know_of_others() -> None:
    model = adapted(Branching(Knows))
    assert_right(model)
    before = model(X)
    other = model.bystander = nn.Identity()
    other.factor = 3.0
    model.layers[3].others.append(other)  # type: ignore[union-attr]
    assert_right(model)
    after = model(X)
    assert_far_apart(after, before)
    other.factor = 4.0
    assert_right(model)
    assert_far_apart(model(X), after)


def test_refresh_reaches_parts() -> None:
    model = adapted(Branching(Tables))
    before = model(X)
    model.layers[1].table[0] = 3.0  # type: ignore[union-attr]
    vera_fx.refresh(model)
    assert_close(model(X), by_hooks(model, X))
    assert_far_apart(model(X), before)


def test_hooks_on_tensors_are_no_reason_to_look_through_modules() -> None:
    model = adapted(Branching())
    model(X)
    model(X)  # capturing leaves something to look at
    looks: list[StateWatch] = []
    look = StateWatch._look_for_hooks

    def counted(self: StateWatch) -> None:
        looks.append(self)
        look(self)

    with mock.patch.object(StateWatch, "_look_for_hooks", counted):
        x = X.clone().requires_grad_()
        x.register_hook(lambda grad: grad)
        model(x)
        assert not looks
        seen: list[Tensor] = []
        model.layers[1].up.register_forward_hook(lambda *call: seen.append(call[2]))  # type: ignore[union-attr]
        expected = by_hooks(model, X)
        seen.clear()
        assert_close(model(X), expected)
        assert looks
    assert len(seen) == 1
    assert seen[0].shape == torch.Size((3, 10))


def test_a_part_that_knows_of_others_by_a_global(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = nn.Module()
    monkeypatch.setitem(globals(), "HOLDER", holder)
    base = Branching(ByGlobal)
    base.factor = 0.5
    model = adapted(base)
    holder.model = model
    assert_right(model)
    before = model(X)
    model.factor = 3.0
    assert_right(model)
    assert_far_apart(model(X), before)
