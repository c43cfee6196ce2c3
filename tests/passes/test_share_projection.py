"""Sharing: what may be shared, and the two reasons not to."""

import torch
from torch import Tensor

from tests.passes.examples import TwoReaders, adapted_readers, graph_of, two_targets
from vera_fx.passes import Reason, ShareProjection, run_passes, tag_of


def products(graph: torch.fx.GraphModule) -> int:
    return sum(1 for n in graph.graph.nodes if (tag := tag_of(n)) and tag.role == "z")


def test_one_product_for_two_readers() -> None:
    graph = adapted_readers()
    assert products(graph) == 2
    run_passes(graph, (ShareProjection(),))
    assert products(graph) == 1


def test_dropout_is_never_shared() -> None:
    graph = graph_of(TwoReaders(), torch.randn(4, 3))
    run_passes(graph, (two_targets(dropout=0.5),))
    report = run_passes(graph, (ShareProjection(),))

    assert products(graph) == 2
    assert [skip.reason for _, skip in report.skips()] == [Reason.OWN_MASKS] * 2


class WrittenBetween(TwoReaders):
    """Changes the input in place between its two readers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1.0
        query = self.query(x)
        x.view(-1).add_(1.0)
        return query, self.value(x)


def test_input_written_in_place_is_not_shared() -> None:
    graph = graph_of(WrittenBetween(), torch.randn(4, 3))
    run_passes(graph, (two_targets(),))
    x = torch.randn(4, 3)
    expected = graph(x)
    report = run_passes(graph, (ShareProjection(),))

    assert products(graph) == 2
    skip = report.skips()[0][1]
    assert (skip.reason, skip.other) == (Reason.WRITTEN_BETWEEN, "mul")
    assert str(skip) == "mul may be changed in place before it"
    assert all(torch.equal(a, b) for a, b in zip(graph(x), expected, strict=True))
