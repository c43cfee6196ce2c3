"""`explain` says which parts share a capture and what was compiled, and what kept parts apart."""

from collections.abc import Iterator

import pytest
import torch

import vera_fx
from tests.caching.test_equal_parts import Branching, Numbered, X, adapted
from tests.caching.test_shared_bodies import Fused
from vera_fx.report.sharing import SharedCapture


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch._dynamo.reset()
    with pytest.warns(vera_fx.PartialCaptureWarning):
        yield


def test_the_report_says_what_is_shared() -> None:
    torch._dynamo.reset()
    model = adapted(Branching(count=5))
    assert not vera_fx.explain(model).shared
    model(X)
    paths = tuple(f"layers.{n}" for n in range(5))
    assert vera_fx.explain(model).shared == (SharedCapture(paths),)
    assert "parts: 5 parts share a capture: layers.0, layers.1, layers.2 and 2 more" in str(
        vera_fx.explain(model)
    )
    torch.compile(model, backend="eager")(X)
    # With gradients; what runs without them is a function of its own.
    assert vera_fx.explain(model).shared == (SharedCapture(paths, functions=1),)
    with torch.no_grad():
        torch.compile(model, backend="eager")(X)
    report = vera_fx.explain(model)
    assert report.shared == (SharedCapture(paths, functions=2),)
    assert "functions compiled: 2" in str(report)
    assert "5 parts share a capture" in report.html()


def test_the_report_says_what_keeps_parts_apart() -> None:
    model = adapted(Branching(Numbered, count=3))
    model(X)
    found = vera_fx.explain(model).shared
    assert [row.parts for row in found] == [("layers.0",), ("layers.1",), ("layers.2",)]
    assert [row.apart for row in found] == [(), ("number",), ("number",)]
    assert "1 part has a capture: layers.2; by itself for number" in str(vera_fx.explain(model))


def test_graphs_that_are_compiled_as_they_are() -> None:
    torch._dynamo.reset()
    base = Branching(count=3)
    with vera_fx.register_base_product(Fused, in_features="wide", out_features="tall"):
        for layer in base.layers:
            layer.up = Fused()
        model = adapted(base, target_modules=["up"])
        torch.compile(model, backend="eager")(X)
        (row,) = vera_fx.explain(model).shared
    assert (len(row.parts), row.functions) == (3, 3)
