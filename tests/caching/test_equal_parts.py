"""Equal parts of a model that runs in Python: captured once, compiled once, and never taken for equal if not."""

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)) + 1.0


class Options:
    """A plain object that layers read."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Layer(nn.Module):
    """One of several, with a number that its forward does not ask for."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.options = number, Options(0.5)
        self.up, self.drop, self.down = nn.Linear(6, 10), nn.Dropout(0.0), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale() * self.down(self.drop(torch.tanh(self.up(x))))

    def scale(self) -> float:
        return self.options.factor


class Numbered(Layer):
    def scale(self) -> float:
        return 1.0 + self.number


class ByName(Layer):
    def scale(self) -> float:
        return 1.0 + getattr(self, "".join(("num", "ber")))


class ByDict(Layer):
    def scale(self) -> float:
        return 1.0 + self.__dict__["number"]


class ByVars(Layer):
    def scale(self) -> float:
        return 1.0 + sum(value for value in vars(self).values() if type(value) is int)


class OfAChild(Layer):
    """What is asked for is an attribute of a module inside."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.drop.p = 0.25 * number

    def scale(self) -> float:
        return 1.0 + self.drop.p


class Branching(nn.Module):
    """Takes a way that depends on values, so that it runs in Python."""

    def __init__(self, kind: type[Layer] = Layer, count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind(number) for number in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.sum() > 1e9:
                return x
        return x


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with pytest.warns(vera_fx.PartialCaptureWarning):
        yield


@pytest.fixture
def exports() -> Iterator[Callable[[], int]]:
    plain, count = torch.export.export, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        # The model itself is tried first, and given up.
        result = plain(*args, **kwargs)
        count += 1
        return result

    with mock.patch("torch.export.export", counted):
        yield lambda: count


def adapted(base: nn.Module, **fields: Any) -> nn.Module:
    fields = {"r": 4, "target_modules": ["up", "down"], **fields}
    model = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(**fields))
    fill_vectors(model)
    return model


def by_hooks(model: nn.Module, x: Tensor) -> Tensor:
    """What the model computes with hooks alone: no graph is in the way."""
    outputs = []
    run = model.layers  # type: ignore[union-attr]
    for layer in run:
        x = type(layer)._vera_base.forward(layer, x)  # type: ignore[attr-defined]
        outputs.append(x)
    return outputs[-1]


def assert_right(model: nn.Module, x: Tensor = X) -> None:
    model(x)
    expected = by_hooks(model, x)
    assert_close(model(x), expected)
    vectors = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected.pow(2).sum(), vectors)
    for found, other in zip(
        torch.autograd.grad(model(x).pow(2).sum(), vectors), wanted, strict=True
    ):
        assert found.abs().sum() > 0
        assert_close(found, other)


def test_equal_layers_are_captured_once(exports: Callable[[], int]) -> None:
    model = adapted(Branching())
    assert_right(model)
    assert exports() == 1
    assert model._vera_runtime.parts.equal.shared == 3
    assert_far_apart(model(X), Branching.forward(model, -X))


@pytest.mark.parametrize("kind", [Numbered, ByName, ByDict, ByVars, OfAChild])
def test_a_number_that_is_asked_for(kind: type[Layer], exports: Callable[[], int]) -> None:
    model = adapted(Branching(kind).eval())
    assert_right(model)
    assert exports() == 4


def test_other_contents_of_an_object(exports: Callable[[], int]) -> None:
    base = Branching()
    base.layers[2].options.factor = 0.75
    model = adapted(base)
    assert_right(model)
    assert exports() == 2


def test_an_object_that_changes_later(exports: Callable[[], int]) -> None:
    model = adapted(Branching())
    assert_right(model)
    before = model(X)
    model.layers[1].options.factor = 2.0
    assert_right(model)
    assert_far_apart(model(X), before)
    model.layers[1].options = Options(0.5)
    assert_close(model(X), before)


def test_train_mode_of_one_layer() -> None:
    base = Branching()
    for layer in base.layers:
        layer.drop.p = 0.999
    model = adapted(base.eval())
    quiet = model(X)
    assert_right(model)
    model.layers[3].drop.train()
    assert_far_apart(model(X), quiet)


def test_other_sizes_and_dtypes_of_one_layer(exports: Callable[[], int]) -> None:
    base = Branching()
    base.layers[1].up, base.layers[1].down = nn.Linear(6, 12), nn.Linear(12, 6, bias=False)
    model = adapted(base)
    assert_right(model)
    assert exports() == 2


def test_a_module_that_two_layers_share() -> None:
    base = Branching()
    base.layers[2].up = base.layers[0].up
    model = adapted(base)
    assert_right(model)


def test_targets_of_some_layers_only(exports: Callable[[], int]) -> None:
    model = adapted(Branching(), target_modules=r"layers\.[02]\.(up|down)|layers\.[13]\.down")
    assert_right(model)
    assert exports() == 1


def test_switching_and_merging_after_sharing(exports: Callable[[], int]) -> None:
    model = adapted(Branching())
    assert_right(model)
    first = model(X)
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=3, target_modules=["down"]))
    with torch.no_grad():
        for parameter in model.vera.adapters["other"].parameters():
            parameter.fill_(0.3)
    vera_fx.set_adapter(model, "other")
    assert_right(model)
    assert_far_apart(model(X), first)
    with vera_fx.disable_adapters(model):
        assert_close(model(X), by_hooks(model, X))
    vera_fx.set_adapter(model, "default")
    vera_fx.merge(model)
    assert_close(model(X), first)
    assert exports() == 1


def test_sizes_that_the_first_does_not_admit(exports: Callable[[], int]) -> None:
    model = adapted(Branching())
    for rows in (3, 1, 5, 0):
        x = torch.randn(rows, 6)
        assert_close(model(x), by_hooks(model, x))
    assert exports() <= 3


@pytest.mark.parametrize("grad", [True, False])
def test_compiled_once(grad: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, graphs = adapted(Branching(count=12)), list[Any]()

    def backend(gm: Any, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend=backend)
    with torch.set_grad_enabled(grad):
        assert_close(compiled(X), by_hooks(model, X))
        # With gradients the first layer's input asks for none, those of all others do.
        assert len(graphs) == 1 + grad
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_close(compiled(2 * X), by_hooks(model, 2 * X))
    assert not torch._dynamo.utils.counters["graph_break"]


def test_layers_that_are_compiled_by_themselves() -> None:
    torch._dynamo.reset()
    model, graphs = adapted(Branching(count=12)), list[Any]()

    def backend(gm: Any, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend=backend)
    assert_close(model(X), by_hooks(model, X))
    assert len(graphs) == 2
    assert_close(model(2 * X), by_hooks(model, 2 * X))
    assert len(graphs) == 2
