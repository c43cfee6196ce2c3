"""The class of an adapted model: every layout of base class, all or nothing, nothing lost on the way."""

import abc
import copy
import pickle
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference
from vera_fx.bank.bank import AdapterBank
from vera_fx.model import adapt as adapting

T = TypeVar("T")
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
CONFIG = vera_fx.VeraConfig(r=4, target_modules=["up", "down"])


class Body:
    """What the models below have in common."""

    up: nn.Linear
    down: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())

    def build(self) -> None:
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 5)


class Plain(Body, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.build()


class Abstract(abc.ABC, Plain):
    @abc.abstractmethod
    def named(self) -> str: ...


class WithABC(Abstract):
    def named(self) -> str:
        return "abc"


class NoSlots:
    __slots__ = ()

    def greet(self) -> str:
        return "hello"


class WithSlots(NoSlots, Plain):
    pass


class WithGeneric(Generic[T], Plain):
    pass


class Meta(type):
    pass


class WithMeta(Plain, metaclass=Meta):
    pass


class Picky(Plain):
    """A class that refuses to be extended."""

    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


KINDS = [Plain, WithABC, WithSlots, WithGeneric, WithMeta]


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_of_class_is_adapted(kind: type[nn.Module]) -> None:
    base = built(kind)
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)

    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    assert_far_apart(model(X), base(X))
    assert_close(model(X), hook_reference(base, model)(X))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(twin(X), model(X))
    vera_fx.unload(model)
    assert type(model) is kind
    assert torch.equal(model(X), base(X))


def test_methods_of_what_stands_in_front_are_there() -> None:
    model = vera_fx.adapt(built(WithSlots), CONFIG)

    assert model.greet() == "hello"
    assert vera_fx.adapt(built(WithABC), CONFIG).named() == "abc"


@pytest.mark.parametrize("kind", KINDS)
def test_calling_the_class_of_an_adapted_model_makes_a_plain_one(kind: type[nn.Module]) -> None:
    model = vera_fx.adapt(built(kind), CONFIG)
    torch.manual_seed(0)
    fresh = type(model)()

    assert type(fresh) is kind
    assert torch.equal(fresh(X), built(kind)(X))


def test_parts_of_every_layout_are_parts() -> None:
    class Halting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(kind() for kind in KINDS)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                y = block(x)
                if y.sum() * 0 > 1:
                    break
                x = x + y.mean()
            return x

    base = built(Halting)
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)
    with pytest.warns(vera_fx.PartialCaptureWarning):
        result = model(X)

    assert_close(result, hook_reference(base, model)(X))
    assert [graph.signature for graph in vera_fx.explain(model).graphs]
    vera_fx.unload(model)
    assert [type(block) for block in model.blocks] == KINDS


def snapshot(model: nn.Module) -> list[Any]:
    """All that adapting changes: classes, hooks, submodules, attributes, what trains."""
    found: list[Any] = []
    for path, module in model.named_modules():
        state = {
            name: list(value.items()) if isinstance(value, dict) else value
            for name, value in module.__dict__.items()
        }
        found.append((path, type(module), state))
    found += [(p, t.requires_grad, t.grad, t._version) for p, t in model.named_parameters()]
    return found


def same(before: list[Any], after: list[Any]) -> bool:
    return str(before) == str(after) and len(before) == len(after)


def test_a_class_that_cannot_be_extended_leaves_the_model_as_it_was() -> None:
    model = built(Plain)
    model.__class__ = Picky
    model.up.bias.requires_grad = False
    before = snapshot(model)
    with pytest.raises(TypeError, match="no subclasses"):
        vera_fx.adapt(model, CONFIG)

    assert same(before, snapshot(model))


STEPS: dict[str, tuple[Any, str]] = {
    "install": (adapting, "install"),
    "place": (adapting, "place_bank"),
    "insert": (AdapterBank, "insert"),
    "activate": (AdapterBank, "activate"),
    "bind": (AdapterBank, "bind"),
    "types": (adapting, "register_types"),
    "extend": (adapting, "extend"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("make", [lambda: built(Plain), lambda: nn.Sequential(built(Plain))])
def test_whatever_fails_the_model_is_what_it_was(
    make: Callable[[], nn.Module], step: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = STEPS[step]
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            original(*args, **kwargs)
        raise MemoryError("sabotaged")

    model = make()
    before = snapshot(model)
    expected = model(X)
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(MemoryError, match="sabotaged"):
        vera_fx.adapt(model, CONFIG)

    assert same(before, snapshot(model))
    monkeypatch.undo()
    assert torch.equal(vera_fx.adapt(model, CONFIG)(X), expected)


def test_an_example_that_fails_leaves_the_model_as_it_was() -> None:
    model = built(Plain)
    before = snapshot(model)
    with pytest.raises(vera_fx.AdapterError, match="is no adapter"):
        vera_fx.adapt(model, CONFIG, example_inputs={"x": X, "adapter_names": ["nobody"] * 3})

    assert same(before, snapshot(model))


def test_a_replica_of_data_parallel_is_refused() -> None:
    model = vera_fx.adapt(built(Plain), CONFIG)
    with pytest.raises(vera_fx.VeraFxError, match="DataParallel cannot copy this Plain"):
        model._replicate_for_data_parallel()  # what torch.nn.parallel.replicate calls
    alone = nn.DataParallel(model)  # without several devices it copies nothing
    assert torch.equal(alone(X), model(X))
    vera_fx.unload(model)
    assert type(model._replicate_for_data_parallel()) is Plain
