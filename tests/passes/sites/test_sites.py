"""The site search: every spelling of a linear call, and an error for every other use."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.passes.examples import graph_of
from vera_fx.base.targets import resolve_targets
from vera_fx.config import VeraConfig
from vera_fx.passes import SiteError, cleanup, find_sites, run_passes


def sites_of(module: nn.Module, x: Tensor, *targets: str) -> list[tuple[str, str]]:
    chosen = resolve_targets(module, VeraConfig(r=2, target_modules=list(targets)))
    graph = graph_of(module, x)
    run_passes(graph, cleanup())
    search = find_sites(graph, list(chosen.values()))
    return [(site.name, site.x.name) for site in search.sites]


class Functional(nn.Module):
    """Uses the layer's weight in a given way instead of calling the layer."""

    def __init__(self, use, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.lin = layer or nn.Linear(3, 5)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.lin(x),
        lambda m, x: nn.functional.linear(x, m.lin.weight),
        lambda m, x: x @ m.lin.weight.T,
        lambda m, x: torch.mm(x, m.lin.weight.t()),
        lambda m, x: torch.addmm(m.lin.bias, x, m.lin.weight.transpose(0, 1)),
        lambda m, x: nn.functional.linear(x.double(), m.lin.weight.double()),
    ],
    ids=["call", "functional", "matmul", "mm", "addmm", "cast"],
)
def test_every_spelling_is_a_site(use) -> None:
    found = sites_of(Functional(use), torch.randn(4, 3), "lin")

    assert [name for name, _ in found] == ["lin"]


def test_conv1d_is_a_site() -> None:
    found = sites_of(Functional(lambda m, x: m.lin(x), Conv1D(5, 3)), torch.randn(4, 2, 3), "lin")

    assert [name for name, _ in found] == ["lin"]


def test_repeated_calls_are_numbered() -> None:
    layer = nn.Linear(3, 3)
    found = sites_of(Functional(lambda m, x: m.lin(m.lin(x)), layer), torch.randn(4, 3), "lin")

    assert [name for name, _ in found] == ["lin", "lin#2"]


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda m, x: m.lin(x) + m.lin.weight.sum(), "no linear call"),
        (lambda m, x: nn.functional.linear(x, m.lin.weight[:2]), "no linear call"),
        (lambda m, x: x[:, :2] @ m.lin.weight[:2], "no linear call"),
    ],
    ids=["sum", "slice", "sliced matmul"],
)
def test_other_uses_are_errors(use, reason: str) -> None:
    with pytest.raises(SiteError, match=reason):
        sites_of(Functional(use), torch.randn(4, 3), "lin")


def test_weight_used_the_other_way_round_is_an_error() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(SiteError, match="the other way round"):
        sites_of(Functional(lambda m, x: x @ m.lin.weight, layer), torch.randn(4, 3), "lin")


class Tied(nn.Module):
    """An output head that shares the embedding's weight, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


def test_tied_embedding_is_left_alone() -> None:
    found = sites_of(Tied(), torch.tensor([[1, 2], [3, 4]]), "head")

    assert [name for name, _ in found] == ["head"]


class TiedPair(nn.Module):
    """Two layers with one weight; which of them a functional use means cannot be told."""

    def __init__(self, *, functional: bool) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            return nn.functional.linear(x, self.a.weight)
        return self.b(torch.tanh(self.a(x)))


def test_tied_targets_are_told_apart_by_their_calls() -> None:
    found = sites_of(TiedPair(functional=False), torch.randn(4, 3), "a", "b")

    assert [name for name, _ in found] == ["a", "b"]


def test_only_the_targeted_one_of_a_tied_pair_is_adapted() -> None:
    found = sites_of(TiedPair(functional=False), torch.randn(4, 3), "b")

    assert [name for name, _ in found] == ["b"]


def test_ambiguous_use_of_a_tied_weight_is_an_error() -> None:
    with pytest.raises(SiteError, match="tied between"):
        sites_of(TiedPair(functional=True), torch.randn(4, 3), "a", "b")


def test_module_registered_twice_is_one_target() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    assert [name for name, _ in sites_of(Twice(), torch.randn(4, 3), "a")] == ["a", "a#2"]


def test_parametrised_weight_is_a_site() -> None:
    module = Functional(lambda m, x: m.lin(x))
    nn.utils.parametrizations.weight_norm(module.lin)

    assert [n for n, _ in sites_of(module, torch.randn(4, 3), "lin")] == ["lin"]


def test_multihead_attention_out_proj_is_a_site() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.mha(x, x, x)[0]

    assert [n for n, _ in sites_of(SelfAttention(), torch.randn(4, 5, 6), "out_proj")] == [
        "mha.out_proj"
    ]
