"""Rows behind a module that is known to keep tokens apart, and of results in tuples."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tests.passes.examples import graph_of
from vera_fx.passes.rows.facts import row_facts
from vera_fx.passes.rows.vocabulary import Fact, Lost, Rows


class Sorting(nn.Module):
    """Treats each token by itself, but in an order that depends on the tokens, as experts do."""

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        order = torch.argsort(scores)
        return (x[order] * 2)[torch.argsort(order)]


class Experts(nn.Module):
    def __init__(self, *, crossed: bool = False) -> None:
        super().__init__()
        self.experts = Sorting()
        self.crossed = crossed

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = (x.transpose(0, 1).flatten(0, 1) if self.crossed else tokens).sum(-1)
        return self.experts(tokens, scores).view(x.shape) + 1


def fact_of_output(graph: GraphModule, *tokenwise: str) -> Fact:
    facts = row_facts(graph, frozenset({0}), frozenset(tokenwise))
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    return facts.of(output.args[0][0])


def test_rows_behind_experts_are_known_if_the_experts_are() -> None:
    graph = graph_of(Experts(), torch.randn(3, 4, 5))
    assert isinstance(fact_of_output(graph), Lost)
    assert isinstance(fact_of_output(graph, "another"), Lost)
    fact = fact_of_output(graph, "experts")
    assert isinstance(fact, Rows)
    assert (fact.dim, fact.inner, fact.outer) == (0, 1, 1)


def test_experts_that_are_given_rows_in_two_orders_lose_them() -> None:
    graph = graph_of(Experts(crossed=True), torch.randn(3, 4, 5))
    assert isinstance(fact_of_output(graph, "experts"), Lost)


class Scaled(nn.Module):
    """Writes to one result of several, as routers do."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        if self.write == "topk":
            values, _ = torch.topk(x, 2, dim=-1)
        else:
            values, _ = x.mul(2).split(2, dim=-1)
        values /= 3
        return values


@pytest.mark.parametrize(("write", "kept"), [("topk", True), ("split", False)])
def test_results_in_a_tuple_share_storage_only_as_views(write: str, kept: bool) -> None:
    graph = graph_of(Scaled(write), torch.randn(3, 4))
    assert isinstance(fact_of_output(graph), Rows if kept else Lost)


class Picking(nn.Module):
    """Indexes one dimension with numbers, as Falcon takes its one key head apart."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x[[0], :] if self.dim == 0 else x[:, [[0, -1], [1, 1]]]


@pytest.mark.parametrize(("dim", "kept"), [(1, True), (0, False)])
def test_numbers_along_another_dimension_keep_the_rows(dim: int, kept: bool) -> None:
    fact = fact_of_output(graph_of(Picking(dim), torch.randn(3, 4, 5)))
    assert isinstance(fact, Rows if kept else Lost)
    assert not kept or fact.dim == 0


def test_numbers_before_the_rows_move_them() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1)[[[0, -1], [1, 1]], :]

    fact = fact_of_output(graph_of(Turned(), torch.randn(3, 4, 5)))
    assert isinstance(fact, Rows)
    assert fact.dim == 2


class Summed(nn.Module):
    """A product with a summand before it, whose rows may lie otherwise than those of the product."""

    def __init__(self, summand: str) -> None:
        super().__init__()
        self.summand = summand

    def forward(self, x: Tensor) -> Tensor:
        if self.summand == "one number a row":
            return torch.addmm(x[:, 0, :1], x[:, 1], torch.ones(4, 4))
        if self.summand == "along the columns":
            return torch.addmm(x[:, 0, 0], x[:, 1], torch.ones(4, 4))
        values = {"none": torch.ones(4), "same": x, "crossed": x.transpose(0, 1)}
        return torch.baddbmm(values[self.summand], x, x.transpose(1, 2))


@pytest.mark.parametrize(
    ("summand", "kept"),
    [
        ("none", True),
        ("same", True),
        ("crossed", False),
        ("one number a row", True),
        ("along the columns", False),
    ],
)
def test_a_summand_of_a_product_has_its_rows_where_the_product_has_them(
    summand: str, kept: bool
) -> None:
    fact = fact_of_output(graph_of(Summed(summand), torch.randn(4, 4, 4)))
    assert isinstance(fact, Rows if kept else Lost)
    assert not kept or fact.dim == 0
