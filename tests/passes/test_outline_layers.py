"""Equal layers become one function; layers that differ in anything do not."""

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tests.passes.examples import graph_of
from vera_fx.passes import CPU, DEVICES, LayerTime, OutlineLayers, is_outlined, run_passes
from vera_fx.passes.engine.graph import owner_path
from vera_fx.passes.engine.reports import Rewrite, Skip
from vera_fx.passes.engine.runner import RunOptions

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self, width: int = 6, scale: float = 1.0, *, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, width, bias=bias), nn.Linear(width, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).sin() * self.scale)


class Stacked(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def outlined(module: nn.Module, least: int = 2) -> tuple[GraphModule, list[str]]:
    """The graph after the pass, and the bodies that it calls in turn."""
    graph = graph_of(module, X)
    before = graph(X)[0]
    report = run_passes(graph, (OutlineLayers(least),)).records[0].report
    assert torch.equal(graph(X)[0], before)
    return graph, [rewrite.other for rewrite in report.rewrites]


def test_equal_layers_share_a_body() -> None:
    graph, bodies = outlined(Stacked(Layer(), Layer(), Layer()))

    assert bodies == ["_body_0"] * 3 + ["_body_1"]
    assert {n.op for n in graph.graph.nodes} == {
        "placeholder", "get_attr", "call_function", "output"
    }  # fmt: skip
    assert is_outlined(graph.graph)


@pytest.mark.parametrize(
    "other",
    [Layer(width=7), Layer(scale=2.0), Layer(bias=False), Layer().double()],
    ids=["width", "constant", "bias", "dtype"],
)
def test_layers_that_differ_do_not(other: nn.Module) -> None:
    if next(other.parameters()).dtype == torch.float64:
        other = nn.Sequential(Cast(torch.float64), other, Cast(torch.float32))
    _, bodies = outlined(Stacked(Layer(), other, Layer()))

    assert bodies[0] == bodies[2] != bodies[1]


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def test_too_few_layers_are_left_alone() -> None:
    assert outlined(Stacked(Layer(), Layer()), least=3)[1] == []
    assert outlined(Stacked(Layer(), Layer()), least=0)[1] == []


def test_the_outermost_equal_modules_are_taken() -> None:
    blocks = [nn.Sequential(Layer(), Layer()) for _ in range(3)]
    _, bodies = outlined(Stacked(*blocks))
    assert bodies == ["_body_0"] * 3 + ["_body_1"]

    uneven = [nn.Sequential(Layer(), Layer()), nn.Sequential(Layer(), Layer(), Layer())]
    _, bodies = outlined(Stacked(*uneven))
    assert bodies == ["_body_0"] * 5 + ["_body_1"]


def test_one_layer_called_again_and_again() -> None:
    layer = Layer()
    _, bodies = outlined(Stacked(layer, layer, layer))
    assert bodies == ["_body_0"] * 3 + ["_body_1"]


def test_replaced_parameters_are_read_live() -> None:
    module = Stacked(Layer(), Layer())
    graph, _ = outlined(module)
    module.layers[1].up.weight = nn.Parameter(torch.randn(6, 3))
    assert torch.equal(graph(X)[0], module(X))


def test_sizes_that_are_related_otherwise_make_another_body() -> None:
    """A body reads its sizes off its own tensors, so equal text would not be enough."""

    class Cut(nn.Module):
        def forward(self, x: Tensor, y: Tensor, size: int) -> Tensor:
            return (x[:size].sum() + x * 2) + y.sum()

    class Cuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Cut(), Cut()])

        def forward(self, x: Tensor) -> Tensor:
            short = x[:2] * 1
            first = self.layers[0](x, short, x.shape[0])
            return self.layers[1](first, short, x.shape[1] - 1)

    graph = graph_of(Cuts(), X)
    run_passes(graph, (OutlineLayers(2),))
    for rows in (2, 4, 9):
        x = torch.randn(rows, 3)
        assert torch.equal(graph(x)[0], Cuts()(x))


def by_work(module: nn.Module, call: float) -> tuple[GraphModule, list[Rewrite], list[Skip]]:
    """What the pass does where a call costs ``call`` times a layer's work."""
    graph = graph_of(module, X)
    before = graph(X)[0]
    layer = LayerTime()(n for n in graph.graph.nodes if "layers.0" in owner_path(n))
    device = dataclasses.replace(CPU, call=call * layer)
    passes = (OutlineLayers(2, saved=0.1, time=LayerTime(device)),)
    report = run_passes(graph, passes, RunOptions(verify=True)).records[0].report
    assert torch.equal(graph(X)[0], before)
    return graph, list(report.rewrites), list(report.skips)


@pytest.mark.parametrize(
    ("call", "bodies"),
    [
        (0.01, [0, 0, 0, 0, 0, 1]),  # a call for each layer
        (0.09, [0, 1, 1, 2]),  # for two: what is over comes first
        (0.14, [0, 1, 2]),  # for three
        (1.00, []),  # too much for as many as there are
    ],
)
def test_as_many_layers_in_a_body_as_pay_for_its_call(call: float, bodies: list[int]) -> None:
    graph, rewrites, skips = by_work(Stacked(*(Layer() for _ in range(5))), call)

    assert [rewrite.other for rewrite in rewrites] == [f"_body_{n}" for n in bodies]
    assert is_outlined(graph.graph) is bool(bodies)
    told = [str(what) for what in (*rewrites[:1], *skips)]
    assert re.search(r"a step of one (such )?layer takes about [\d.e-]+ ms", told[0])
    assert len(skips) == (not bodies)


@pytest.mark.parametrize(
    ("device", "rows", "outlined"),
    [("cpu avx512", 4, False), ("cpu avx512", 20_000, True), ("h200", 20_000, False)],
)
def test_the_sizes_and_the_device_decide(device: str, rows: int, outlined: bool) -> None:
    """The same graph: a call is much beside few rows, and beside many where they take no time."""
    graph = graph_of(Stacked(*(Layer(width=4096) for _ in range(4))), X)
    (x,) = (n for n in graph.graph.nodes if n.op == "placeholder")
    sizes = {x.meta["val"].shape[0].node.expr: rows}
    run_passes(graph, (OutlineLayers(time=LayerTime(DEVICES[device], sizes)),))
    assert is_outlined(graph.graph) is outlined


def test_open_sizes_count_as_they_are() -> None:
    graph = graph_of(Stacked(Layer(), Layer()), X)
    (x,) = (n for n in graph.graph.nodes if n.op == "placeholder")
    rows = x.meta["val"].shape[0].node.expr
    few, many = (LayerTime(CPU, {rows: size})(graph.graph.nodes) for size in (4, 4000))
    assert many == pytest.approx(1000 * few, rel=0.01)
