"""One function for graphs of equal parts; graphs that call modules keep one each, and open ranks stay open."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import vera_fx
from tests.caching.test_equal_parts import Branching, X, adapted, by_hooks
from tests.helpers import assert_close, assert_far_apart
from vera_fx.caching import shared_bodies


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with pytest.warns(vera_fx.PartialCaptureWarning):
        yield


class Fused(nn.Module):
    """A linear layer with a kernel of its own, which graphs call."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = 6, 10
        self.packed = nn.Parameter(torch.randn(6, 10), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.packed


def test_graphs_that_call_modules_are_looked_at_once() -> None:
    """They keep a function each, and are not copied anew with every call to find that out."""
    base = Branching(count=3)
    with vera_fx.register_base_product(Fused, in_features="wide", out_features="tall"):
        for layer in base.layers:
            layer.up = Fused()
        model = adapted(base, target_modules=["up"])
        compiled = torch.compile(model, backend="eager")
        with mock.patch.object(shared_bodies, "copy_of", wraps=shared_bodies.copy_of) as copies:
            assert_close(compiled(X), by_hooks(model, X))
            before = copies.call_count
            assert before
            assert_close(compiled(X), by_hooks(model, X))
            assert copies.call_count == before


def test_ranks_stay_open_where_parts_share_a_function() -> None:
    """Without gradients, before it is known that there will be several ranks."""
    torch._dynamo.reset()
    model, counter = adapted(Branching()), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        first = compiled(X)
        assert_close(first, by_hooks(model, X))
        assert counter.frame_count == 1
        vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=3, target_modules=["up", "down"]))
        for parameter in model.vera.adapters["other"].parameters():
            parameter.fill_(0.3)
        vera_fx.set_adapter(model, "other")
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_close(compiled(X), by_hooks(model, X))
        assert_far_apart(compiled(X), first)
