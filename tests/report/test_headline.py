"""What stands first in `explain`: what trains, the memory, the plans, the makes of quantised targets."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import vera_fx
from vera_fx.report.headline import plan_mix, size
from vera_fx.report.picture import COLOURS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3)
        self.register_buffer("shift", torch.zeros(7, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Packed(nn.Linear):
    """A layer that somebody registered."""


def adapted(**config) -> nn.Module:
    fields = {"r": 4, "target_modules": ["first", "second"], **config}
    return vera_fx.adapt(Net(), vera_fx.VeraConfig(**fields))


def test_counts_by_hand() -> None:
    found = vera_fx.explain(adapted()).headline
    base, vectors = 6 * 10 + 10 + 10 * 3 + 3, (4 + 10) + (4 + 3)
    assert (found.trainable, found.total) == (vectors, base + vectors)
    assert found.base == 4 * base + 8 * 7
    assert found.projections == 4 * (4 * 10 + 10 * 4)
    assert found.adapters == 4 * vectors
    assert found.training == 3 * 4 * vectors


def test_counts_are_those_of_the_summary_and_of_what_trains_now() -> None:
    model = adapted(modules_to_save=["second"], target_modules=["first"])
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=9, target_modules=["second"]))
    found, summary = vera_fx.explain(model).headline, vera_fx.parameter_summary(model)
    assert (found.trainable, found.total) == (summary.trainable, summary.total)
    copy, first, other = 10 * 3 + 3, 4 + 10, 9 + 3
    assert found.trainable == copy + first
    assert found.adapters == 4 * (copy + first + other)
    assert found.projections == 4 * (4 * 6 + 10 * 4 + 9 * 10 + 3 * 9)
    vera_fx.set_adapter(model, "other")
    assert vera_fx.explain(model).headline.training == 3 * 4 * other
    with vera_fx.disable_adapters(model):
        assert vera_fx.explain(model).headline.trainable == 0


def test_the_text_begins_with_it() -> None:
    first, second, *_ = str(vera_fx.explain(adapted())).splitlines()
    assert first == "trainable: 21 of 124 parameters (16.94 %)"
    assert second == (
        "memory: base 468 B, projections 320 B, adapters 84 B, gradients and AdamW 252 B; "
        "activations are not counted"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**19, "2.5 MiB"), (3 * 2**50, "3072.0 TiB")],
)  # fmt: skip
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


class Words(HTMLParser):
    """The text of a page, in order, and the widths of its bars."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.bars: list[list[tuple[float, str]]] = []
        self.feed(page.partition("</style>")[2])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if ("class", "bar") in attrs:
            self.bars.append([])
        if tag == "i":
            style = dict(attrs)["style"] or ""
            found = re.fullmatch(r"width:([\d.]+)%;background:(#\w+)", style)
            assert found, style
            self.bars[-1].append((float(found[1]), found[2]))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_has_it_before_anything_else() -> None:
    model = adapted(plan="factored")
    model(torch.randn(5, 6))
    page = Words(vera_fx.explain(model).html())
    above = page.words[: page.words.index("adapters")]
    for words in (
        "16.94 %",
        "21 of 124 parameters",
        "468 B",
        "252 B",
        "graph 0, train: 2 factored",
    ):
        assert words in page.words
        assert words in page.words[: page.words.index("targets")]
    assert above[:2] == ["Net, adapted", "trainable"]
    (share, plans) = page.bars
    assert [width for width, _ in share] == [16.94, 83.06]
    assert plans == [(100.0, COLOURS["factored"])]


def test_a_mix_of_plans_in_the_legends_order() -> None:
    model = adapted()
    model(torch.randn(5, 6))
    report = vera_fx.explain(model)
    (graph,) = report.graphs
    names = ("merged", "factored", "merged", "merged")
    plans = tuple(graph.plans[0]._replace(site=str(n), plan=p) for n, p in enumerate(names))
    mixed = dataclasses.replace(graph, plans=plans)
    assert list(plan_mix(mixed).items()) == [("factored", 1), ("merged", 3)]


def test_many_graphs_are_counted_and_none_is_said() -> None:
    model = adapted()
    assert "none yet: call the model" in Words(vera_fx.explain(model).html()).words
    model(torch.randn(5, 6))
    report = vera_fx.explain(model)
    many = dataclasses.replace(report, graphs=report.graphs * 7)
    words = Words(many.html()).words
    assert "and 3 more graphs below" in words
    assert sum(word.startswith("graph ") and "sites" not in word for word in words) == 4


def test_makes_of_targets_stand_on_the_page_as_in_the_text() -> None:
    plain = vera_fx.explain(adapted())
    assert Words(plain.html()).words.count("base") == 1  # of the memory
    assert plain.target_table()[0][-1] == "adapters"
    with vera_fx.register_base_product(Packed, label="Packed, 4 bit <b>"):
        base = nn.Sequential(Packed(6, 10), nn.Linear(10, 3))
        report = vera_fx.explain(
            vera_fx.adapt(base, vera_fx.VeraConfig(r=4, target_modules=["0", "1"]))
        )
    header, rows = report.target_table()
    assert header[-1] == "base"
    assert [row[-1] for row in rows] == ["Packed, 4 bit <b>", ""]
    page = report.html()
    assert "<b>" not in page
    words = Words(page).words
    assert "targets: 1 Packed, 4 bit <b>" in words
    assert words[words.index("target") : words.index("target") + 6] == list(header)
    assert "Packed, 4 bit <b>" in words
    assert "Packed, 4 bit <b>" in str(report)
