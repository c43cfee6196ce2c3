"""Docstring graphs are golden; every pass keeps its contract on its own example."""

import inspect
import re
import textwrap

import pytest
import torch

from tests.passes.examples import EXAMPLES, Example
from vera_fx import passes
from vera_fx.passes import Numerics, RunOptions, graph_text, run_passes

NAMES = sorted(EXAMPLES)


def quoted(graph_pass: object, heading: str) -> str:
    """The graph under ``Before::`` or ``After::`` in a pass's docstring."""
    text = inspect.cleandoc(type(graph_pass).__doc__ or "")
    found = re.search(rf"{heading}::\n\n((?:    .*\n)+)", text)
    assert found, f"{type(graph_pass).__name__} shows no {heading} graph"
    return textwrap.dedent(found[1]).strip()


@pytest.mark.parametrize("name", NAMES)
def test_docstring_shows_what_the_pass_does(name: str) -> None:
    example = EXAMPLES[name]
    graph = example.build()

    assert graph_text(graph) == quoted(example.graph_pass, "Before")
    report = run_passes(graph, (example.graph_pass,), RunOptions(verify=True))
    assert graph_text(graph) == quoted(example.graph_pass, "After")
    assert report.records[0].report.rewrites


@pytest.mark.parametrize(
    "name", [n for n in NAMES if EXAMPLES[n].graph_pass.numerics is Numerics.BITWISE]
)
def test_bitwise_pass_keeps_every_bit(name: str) -> None:
    example = EXAMPLES[name]
    torch.manual_seed(1)
    graph, x = example.build(), torch.randn(6, 3, requires_grad=True)
    before, grad_before = outputs_and_grad(graph, x)
    run_passes(graph, (example.graph_pass,))
    after, grad_after = outputs_and_grad(graph, x)

    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(grad_after, grad_before)


def outputs_and_grad(graph: torch.fx.GraphModule, x: torch.Tensor):
    outputs = list(graph(x))
    return outputs, torch.autograd.grad(sum(y.square().sum() for y in outputs), x)[0]


@pytest.mark.parametrize("name", NAMES)
def test_emitted_nodes_carry_true_metadata(name: str) -> None:
    example = EXAMPLES[name]
    graph = example.build()
    run_passes(graph, (example.graph_pass,))

    class Checker(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node):
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and isinstance(n.meta.get("val"), torch.Tensor):
                assert value.dtype == n.meta["val"].dtype
                assert value.ndim == n.meta["val"].ndim
            return value

    inputs = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
    widths = [x.shape[1] if isinstance(x.shape[1], int) else 3 for x in inputs]
    Checker(graph).run(
        *(torch.randn(6, width, dtype=x.dtype) for width, x in zip(widths, inputs, strict=True))
    )


def test_every_pass_has_an_example() -> None:
    found = {
        name
        for name, value in vars(passes).items()
        if inspect.isclass(value) and isinstance(getattr(value, "numerics", None), Numerics)
    }

    assert found == set(EXAMPLES)


def test_docstrings_have_all_headings() -> None:
    for example in EXAMPLES.values():
        assert isinstance(example, Example)
        text = type(example.graph_pass).__doc__ or ""
        for heading in ("Before::", "After::", "Needs:", "Keeps:", "Skips:"):
            assert heading in text, f"{type(example.graph_pass).__name__} lacks {heading}"
