"""`explain(model).html()` and `.svg()`: well-formed, true to the graph, folded, harmless."""

import copy
import dataclasses
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import vera_fx
from tests.export.export_models import adapted, call_of
from vera_fx.branches.vera.kind import VERA
from vera_fx.report.picture import COLOURS, blocks


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(6, 6) for n in ("q", "v")}) for _ in range(depth)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer["q"](x)) * layer["v"](x)
        return self.head(x)


def explained(model: nn.Module, *inputs: torch.Tensor, **config) -> vera_fx.explain:
    model = vera_fx.adapt(model, vera_fx.VeraConfig(r=2, **config)).eval()
    model(*inputs)
    return vera_fx.explain(model)


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_32_layers_fold_into_one_block() -> None:
    report = explained(Deep(32), torch.ones(4, 6), target_modules=["q", "v", "head"])
    folded = blocks(report, report.graphs[0])
    titles = ["layers.0 … 31  (32 equal layers)", "outside of layers"]
    assert [(block.title, block.layers) for block in folded] == [(titles[0], 32), (titles[1], 1)]
    assert [[row.name for row in block.rows] for block in folded] == [["q", "v"], ["head"]]
    assert len(report.graphs[0].sites) == 65
    words = texts(report.svg())
    assert {"before", "after"} <= set(words)
    assert words.count("linear 6 → 6") == 2
    assert words.count("linear 6 → 3") == 1
    assert {"each layer: 72", "36", "16", "8"} <= set(words)


@pytest.mark.parametrize("plan", COLOURS)
def test_plans_and_shared_products(plan: str) -> None:
    report = explained(Deep(2), torch.ones(4, 6), target_modules=["q", "v", "head"], plan=plan)
    (layers, rest), svg = blocks(report, report.graphs[0]), report.svg()
    assert [row.z for row in layers.rows] == (["q", "q"] if plan != "dense" else ["", ""])
    assert [row.z for row in rest.rows] == [""]
    assert {row.plan for row in (*layers.rows, *rest.rows)} == {plan}
    assert svg.count('class="bracket"') == (plan != "dense")
    words = texts(svg)
    assert f"linear 6 → 6  {VERA.words[plan].formula}" in words
    assert words.count(plan) == 3


def test_layers_that_differ_are_not_folded() -> None:
    chosen = "layers.*.q|layers.1.v"
    report = explained(Deep(3), torch.ones(4, 6), target_modules=chosen.replace(".*.", r"\.\d\."))
    titles = [block.title for block in blocks(report, report.graphs[0])]
    assert titles == ["layers.0", "layers.1", "layers.2"]
    assert "each layer" not in report.svg()


def test_every_site_of_a_family_is_drawn() -> None:
    _, model = adapted("llama")
    model(**call_of("llama"))
    report = vera_fx.explain(model)
    rows = [row for block in blocks(report, report.graphs[0]) for row in block.rows]
    assert {row.plan for row in rows} == {plan for _, plan, _ in report.graphs[0].plans}
    assert len(report.graphs[0].sites) == 2 * len([r for r in rows if "proj" in r.name])
    page = report.html()
    assert page.count("<svg") == len(report.graphs) == 1
    assert "InsertBranches" in page


def test_names_cannot_break_the_page() -> None:
    report = explained(Deep(1), torch.ones(4, 6), target_modules=["head"])
    odd = "<script>alert(1)</script> & more"
    hostile = dataclasses.replace(copy.copy(report), adapters=(odd,), active=(odd,))
    assert "<script>" not in hostile.html()
    assert "&lt;script&gt;" in hostile.html()


def test_without_graphs() -> None:
    model = vera_fx.adapt(Deep(1), vera_fx.VeraConfig(r=2, target_modules=["head"]))
    assert "No graph has been captured yet" in vera_fx.explain(model).html()
    with pytest.raises(IndexError):
        vera_fx.explain(model).svg()
