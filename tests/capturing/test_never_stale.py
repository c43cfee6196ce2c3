"""Whatever changes about a model behind its graph leads to the right result: a test per kind of change.

docs/reliability.md has a row for each. The oracle is the model's own forward, run in Python.
"""

import contextlib
import enum
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vera_fx
from tests.helpers import assert_close, fill_vectors
from vera_fx.base.modules import original_class

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))

GAIN = 1.0
FLAGS = {"double": False}
SETTINGS = types.SimpleNamespace(shift=0.0)
space = types.ModuleType("space")
space.factor = 1.0


def helper(x: Tensor) -> Tensor:
    return x * GAIN


class Namespace:
    scale = 1.0


class Rope:
    """A plain object that a model holds."""

    __slots__ = ("base",)

    def __init__(self) -> None:
        self.base = 1.0


class Inner:
    def __init__(self) -> None:
        self.factor = 1.0
        self.nested = {"factor": 1.0, "list": [1.0]}
        self.rope = Rope()


class Outer:
    def __init__(self) -> None:
        self.inner = Inner()


class Config:
    def __init__(self) -> None:
        self.rope = {"factor": 1.0, "deep": {"bias": 0.0}}
        self.names = ["a", "b"]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Base(nn.Module):
    offset = 0.0


def closed(gain: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    def apply(x: Tensor) -> Tensor:
        return x * gain

    def change(value: float) -> None:
        nonlocal gain
        gain = value

    return apply, change


class Net(Base):
    """Reads something of every kind."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.wo = nn.Linear(6, 6)
        self.act: nn.Module = nn.ReLU()
        self.items = nn.ModuleList([nn.Identity(), nn.Tanh()])
        self.table = nn.ModuleDict({"only": nn.Sigmoid()})
        self.chain = nn.Sequential(nn.Identity(), nn.Softplus())
        self.flags = {"skip": False}
        self.order = [0, 1]
        self.chosen = {1}
        self.recent = deque([1.0])
        self.outer = Outer()
        self.config = Config()
        self.plain = torch.ones(6)
        self.closure, self.change = closed(1.0)
        self.register_buffer("mask", torch.ones(6))
        self.power = 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.lin(x)) * self.gain + self.offset
        y = y if self.flags["skip"] else y + 1
        for index in self.order:
            y = self.items[index](y)
        y = self.chain(self.table["only"](y)) * self.mask + self.plain
        y = y * len(self.chosen) + self.recent[-1] * self.power
        inner = self.outer.inner
        y = y * inner.factor * inner.nested["factor"] * inner.nested["list"][0] * inner.rope.base
        y = y * self.config.rope["factor"] + self.config.rope["deep"]["bias"]
        y = y * len(self.config.names)
        y = self.closure(helper(y)) + SETTINGS.shift + space.factor * Namespace.scale
        y = y * 2 if FLAGS["double"] else y
        return self.method(self.wo(y.to(self.wo.weight.dtype))).to(x.dtype)

    def method(self, y: Tensor) -> Tensor:
        return y.cos()


def net() -> Net:
    torch.manual_seed(0)
    model = vera_fx.adapt(Net().eval(), vera_fx.VeraConfig(r=3, target_modules=["lin", "wo"]))
    fill_vectors(model)
    return model


def in_python(model: nn.Module, x: Tensor = X) -> Tensor:
    return original_class(model).forward(model, x).detach()


def set_attribute(where: Any, name: str, value: Any) -> Callable[[], None]:
    """Set it; gives what undoes that."""
    old = getattr(where, name)
    setattr(where, name, value)
    return lambda: setattr(where, name, old)


def set_item(where: Any, key: Any, value: Any) -> Callable[[], None]:
    old = where[key]
    where[key] = value
    return lambda: where.__setitem__(key, old)


def set_global(name: str, value: Any) -> Callable[[], None]:
    return set_item(globals(), name, value)


def set_class(module: nn.Module, value: type) -> Callable[[], None]:
    old = module.__class__
    module.__class__ = value
    return lambda: setattr(module, "__class__", old)


def append(where: list[Any], value: Any) -> Callable[[], None]:
    where.append(value)
    return lambda: drop(where)


def drop(where: list[Any]) -> None:
    where.pop()


def add(where: set[Any], value: Any) -> Callable[[], None]:
    where.add(value)
    return lambda: where.discard(value)


def parametrized(module: nn.Module) -> Callable[[], None]:
    parametrize.register_parametrization(module, "weight", Twice())
    return lambda: parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def cast(module: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    old = module.weight.dtype
    module.to(dtype)

    def undo() -> None:
        module.to(old)

    return undo


def written(tensor: Tensor, value: float) -> Callable[[], None]:
    old = tensor.detach().clone()
    with torch.no_grad():
        tensor.mul_(value)

    def undo() -> None:
        tensor.data.copy_(old)

    return undo


def tied(model: Net) -> Callable[[], None]:
    old = model.wo.weight
    model.wo.weight = model.lin.weight
    return lambda: setattr(model.wo, "weight", old)


def grown(model: Net) -> Callable[[], None]:
    """Another parameter of another shape, where the code reads one."""
    return set_attribute(model, "mask", torch.linspace(0, 1, 6).expand(4, 6).contiguous())


CHANGES: dict[str, Callable[[Net], Callable[[], None]]] = {
    "submodule: attribute": lambda m: set_attribute(m, "act", nn.Tanh()),
    "submodule: same class": lambda m: set_attribute(m, "act", nn.LeakyReLU(0.5)),
    "submodule: ModuleList": lambda m: set_item(m.items, 0, Doubled()),
    "submodule: ModuleDict": lambda m: set_item(m.table, "only", Doubled()),
    "submodule: Sequential": lambda m: set_item(m.chain, 0, Doubled()),
    "submodule: target": lambda m: set_attribute(m, "lin", nn.Linear(6, 6, bias=False)),
    "submodule: class of": lambda m: set_class(m.act, nn.Tanh),
    "dict in place": lambda m: set_item(m.flags, "skip", True),
    "list in place": lambda m: set_item(m.order, 1, 0),
    "list appended": lambda m: append(m.order, 1),
    "set in place": lambda m: add(m.chosen, 2),
    "deque in place": lambda m: set_item(m.recent, 0, 3.0),
    "attribute": lambda m: set_attribute(m, "power", 3),
    "attribute: NaN": lambda m: set_attribute(m, "power", float("nan")),
    "attribute: tensor": lambda m: set_attribute(m, "plain", torch.linspace(0, 1, 6)),
    "attribute: method": lambda m: set_attribute(m, "method", torch.sin),
    "object two levels deep": lambda m: set_attribute(m.outer.inner, "factor", 2.0),
    "object: dict in it": lambda m: set_item(m.outer.inner.nested, "factor", 2.0),
    "object: list in it": lambda m: set_item(m.outer.inner.nested["list"], 0, 2.0),
    "object: slots": lambda m: set_attribute(m.outer.inner.rope, "base", 2.0),
    "object: replaced": lambda m: set_attribute(m.outer, "inner", _other(Inner(), factor=3.0)),
    "config: dict": lambda m: set_item(m.config.rope, "factor", 2.0),
    "config: nested dict": lambda m: set_item(m.config.rope["deep"], "bias", 2.0),
    "config: list": lambda m: append(m.config.names, "c"),
    "class attribute": lambda m: set_attribute(Net, "gain", 2.0),
    "class attribute: inherited": lambda m: set_attribute(Base, "offset", 2.0),
    "class: method": lambda m: set_attribute(Net, "method", lambda _self, y: y.sin()),
    "module global": lambda m: set_global("GAIN", 2.0),
    "module global: dict": lambda m: set_item(FLAGS, "double", True),
    "module global: object": lambda m: set_attribute(SETTINGS, "shift", 2.0),
    "module global: module": lambda m: set_attribute(space, "factor", 2.0),
    "module global: class": lambda m: set_attribute(Namespace, "scale", 2.0),
    "module global: function": lambda m: set_global("helper", lambda x: x * 3),
    "closure": lambda m: m.change(2.0) or (lambda: m.change(1.0)),
    "buffer: replaced": lambda m: set_attribute(m, "mask", torch.linspace(0, 1, 6)),
    "buffer: another shape": grown,
    "buffer: written": lambda m: written(m.mask, 3.0),
    "weight: replaced": lambda m: set_attribute(m.lin, "weight", nn.Parameter(torch.randn(6, 6))),
    "weight: written": lambda m: written(m.lin.weight, 3.0),
    "weight: tied anew": tied,
    "dtype of one target": lambda m: cast(m.wo, torch.float64),
    "parametrisation": lambda m: parametrized(m.lin),
}


def _other(value: Any, **attributes: Any) -> Any:
    vars(value).update(attributes)
    return value


@contextlib.contextmanager
def changed(model: Net, kind: str) -> Iterator[None]:
    undo = CHANGES[kind](model)
    try:
        yield
    finally:
        undo()


SAME_VALUES = {"dtype of one target"}
"""Changes after which another graph computes the same."""


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_seen_and_so_is_its_end(kind: str, compiled: bool) -> None:
    model = net()
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    before = call(X).detach()
    assert_close(before, in_python(model), factor=5)

    with changed(model, kind):
        found, expected = call(X).detach(), in_python(model)
        if kind not in SAME_VALUES:
            assert not torch.allclose(expected, before, atol=1e-4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        graphs = len(list(model.__dict__["_vera_runtime"].all_captures()))
        call(X)
        assert len(list(model.__dict__["_vera_runtime"].all_captures())) == graphs
    assert_close(call(X).detach(), before, factor=5)


def test_what_nobody_reads_captures_nothing() -> None:
    """Stamps change, facts do not."""
    model = net()
    model(X)
    with changed(model, "module global"):
        model(X)
    globals()["UNREAD"] = 3
    Net.unread = 4
    try:
        model(X)
    finally:
        del globals()["UNREAD"], Net.unread
    runtime = model.__dict__["_vera_runtime"]
    assert len(list(runtime.all_captures())) == 2


def test_objects_that_answer_every_name_are_not_asked() -> None:
    class Answers:
        __slots__ = ("__dict__", "slot")

        def __getattr__(self, name: str) -> object:
            raise RuntimeError(f"asked for {name}")

    model = net()
    model.outer.strange = Answers()
    before = model(X)
    model.outer.strange.slot = 3
    assert torch.equal(model(X), before)


def test_constants_that_cannot_be_hashed() -> None:
    class Level(enum.Enum):  # noqa: PLW1641
        LOW = 1
        HIGH = 2

        def __eq__(self, other: object) -> bool:  # and so no __hash__
            return self is other

    model = net()
    model.outer.level = Level.LOW
    before = model(X)
    model.outer.level = Level.HIGH
    assert torch.equal(model(X), before)


def test_nan_captures_once() -> None:
    model = net()
    for _ in range(3):
        model.power = float("nan")
        model(X)
    assert len(list(model.__dict__["_vera_runtime"].all_captures())) == 1


def test_device_of_one_target() -> None:
    model = net()
    model(X)
    watch = model.__dict__["_vera_runtime"].watch
    state, before = watch.state(), dict(model.wo._parameters)
    model.wo.to("meta")
    assert watch.state() != state
    model.wo._parameters.update(before)
    assert watch.state() == state


def test_default_dtype_and_device() -> None:
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.lin(x) + torch.ones(6).to(x.device).to(x.dtype) * torch.ones(1).element_size()
            )

    model = vera_fx.adapt(Makes(), vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    before = model(X)
    torch.set_default_dtype(torch.float64)
    try:
        assert_close(model(X).detach(), in_python(model), factor=5)
        assert not torch.equal(model(X), before)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(model(X), before)


def test_settings_of_kernels_capture_nothing() -> None:
    model = net()
    model(X)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        model(X)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(list(model.__dict__["_vera_runtime"].all_captures())) == 1


def test_what_leaves_no_mark_is_seen_after_refresh() -> None:
    import numpy as np

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.table = nn.Linear(6, 6), np.ones(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) * float(self.table[0])

    model = vera_fx.adapt(Reads(), vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    before = model(X)
    model.table[0] = 3.0
    vera_fx.refresh(model)
    assert_close(model(X), 3 * before, factor=5)
    with pytest.raises(vera_fx.AdapterError, match="is not adapted"):
        vera_fx.refresh(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["opt", "llama", "bert", "t5", "gpt2", "vit"])
def test_models_of_transformers_stay_in_their_state(name: str) -> None:
    """Nothing that transformers does in a call counts as a change, or every call would capture."""
    from tests.models import BY_NAME

    family = BY_NAME[name]
    model = vera_fx.adapt(family.build().eval(), vera_fx.VeraConfig(r=3, **family.config))
    inputs = family.inputs()
    model(**inputs)
    watch = model.__dict__["_vera_runtime"].watch
    state = watch.state()
    model(**inputs)
    model.train()
    assert watch.state() != state
    model.eval()
    assert watch.state() == state
    model(**inputs)
    assert len(list(model.__dict__["_vera_runtime"].all_captures())) == 1
