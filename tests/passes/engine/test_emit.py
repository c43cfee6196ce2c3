"""How passes run operators on fake tensors: what failed with torch 2.11 stands as its very cause."""

import pytest
import torch
from torch import Tensor, nn

from tests.passes.examples import graph_of
from vera_fx.passes.engine.emit import Put
from vera_fx.passes.engine.graph import is_call, tensor_of
from vera_fx.passes.engine.protocol import EmitError

aten = torch.ops.aten


def put_at_sine(rows: int = 4) -> Put:
    """At the only operator of a graph with an open size."""

    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    graph = graph_of(Sine(), torch.randn(rows, 3))
    (sine,) = (node for node in graph.graph.nodes if is_call(node, aten.sin.default))
    return Put(graph, "test", "site", sine)


def python_kernels_are_on() -> bool:
    key = torch._C.DispatchKey.PythonDispatcher
    return torch._C._dispatch_tls_is_dispatch_key_included(key)


def test_operators_run_by_pythons_kernels_and_without_gradients() -> None:
    """Without them torch 2.11 asks a tensor of open size for its number of elements, and fails."""
    put, seen = put_at_sine(), []

    def probe(x: Tensor) -> Tensor:
        seen.append((python_kernels_are_on(), torch.is_grad_enabled()))
        return x.clone()

    with put.gm.graph.inserting_before(put.like):
        put(probe, put.like.args[0], role="probe")
    assert seen == [(True, False)]
    assert not python_kernels_are_on()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_keep_open_sizes(dtype: torch.dtype) -> None:
    put = put_at_sine()
    with put.gm.graph.inserting_before(put.like):
        cast = put.cast(put.like.args[0], dtype, role="half")
    assert tensor_of(cast).dtype == dtype
    assert isinstance(tensor_of(cast).shape[0], torch.SymInt)


def test_what_cannot_be_inserted_names_its_site() -> None:
    put = put_at_sine()
    with (
        put.gm.graph.inserting_before(put.like),
        pytest.raises(EmitError, match="aten.mm.default cannot be inserted"),
    ):
        put(aten.mm.default, put.like.args[0], put.like.args[0], role="wrong")
