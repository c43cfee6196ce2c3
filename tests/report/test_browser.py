"""`explain(model).html()` and `.svg()` in a real browser: rendered, folded, readable."""

import dataclasses
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

import vera_fx
from tests.report.browser import CHROMIUM, deep_llama, measured, screenshot

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def report() -> Any:
    return vera_fx.explain(deep_llama())


@pytest.fixture(scope="module")
def page(report: Any) -> dict[str, Any]:
    return measured(report.html())


def overlap(a: dict, b: dict) -> bool:
    apart = a["right"] <= b["x"] or b["right"] <= a["x"] or a["bottom"] <= b["y"] + 1
    return not (apart or b["bottom"] <= a["y"] + 1)


def test_the_page_renders_without_faults(page: dict[str, Any]) -> None:
    assert page["faults"] == page["console"] == []
    assert page["title"] == "LlamaForCausalLM, adapted"
    assert page["width"] <= page["inner"]  # nothing to scroll sideways
    rows = {row["text"]: row for row in page["rows"]}
    first = [text for text in rows if text.startswith("base")]
    assert len(first) == 1
    for text in (*first, "targets192, with 1,343,488 frozen weights"):
        assert rows[text]["bottom"] < 400  # seen without scrolling


def test_32_layers_fold_to_one_screen(report: Any, page: dict[str, Any]) -> None:
    (picture,) = page["pictures"]
    assert len(report.graphs[0].sites) == 6 * 32
    assert len(picture["before"]) == len(picture["after"]) == 6
    assert picture["bottom"] - picture["y"] < 400
    assert page["height"] < 1320
    texts = [text["text"] for text in picture["texts"]]
    assert "model.layers.0 … 31  (32 equal layers)" in texts


def test_before_and_after_stand_side_by_side(page: dict[str, Any]) -> None:
    (picture,) = page["pictures"]
    for before, after in zip(picture["before"], picture["after"], strict=True):
        assert before["y"] == after["y"]
        assert before["right"] < after["x"]
    for upper, lower in pairwise(picture["before"]):
        assert upper["bottom"] < lower["y"]


def test_no_text_runs_into_another_or_out_of_its_box(page: dict[str, Any]) -> None:
    check_texts(page["pictures"][0])


def check_texts(picture: dict[str, Any]) -> None:
    texts = picture["texts"]
    assert len(texts) > 40
    clashes = [(a["text"], b["text"]) for a, b in combinations(texts, 2) if overlap(a, b)]
    assert not clashes
    boxes = [*picture["before"], *picture["after"]]
    for text in texts:
        assert picture["x"] <= text["x"] < text["right"] <= picture["right"]
        around = [box for box in boxes if overlap(text, box)]
        assert len(around) <= 1
        assert all(box["x"] < text["x"] and text["right"] < box["right"] for box in around)


def test_without_folding_every_site_has_its_row() -> None:
    model = deep_llama(layers=3)
    vera_fx.add_adapter(
        model, "second", vera_fx.VeraConfig(r=4, target_modules=["layers.1.mlp.up_proj"])
    )
    (picture,) = measured(vera_fx.explain(model).html())["pictures"]
    assert len(picture["after"]) == 18
    titles = [text["text"] for text in picture["texts"] if text["kind"] == "title"]
    assert titles == [f"model.layers.{number}" for number in range(3)]


def test_the_longest_texts_fit(report: Any) -> None:
    graph = report.graphs[0]
    long = {
        old.path: f"experts.shared_gate_up_projection_of_all.{n}"
        for n, old in enumerate(report.targets[:1])
    }
    renamed = [
        dataclasses.replace(
            t, path=long.get(t.path, t.path), in_features=262_144, out_features=262_144
        )
        for t in report.targets
    ]
    plans = tuple((long.get(site, site), "factored", why) for site, _, why in graph.plans)
    graphs = (dataclasses.replace(graph, plans=plans),)
    found = dataclasses.replace(report, targets=tuple(renamed), graphs=graphs)
    check_texts(measured(found.html())["pictures"][0])


def test_hostile_names_stay_text(report: Any) -> None:
    odd = "<script>document.title='taken'</script><img src=x onerror=faults.push('ran')>"
    found = measured(dataclasses.replace(report, adapters=(odd,), model=odd).html())
    assert found["faults"] == []
    assert found["title"] == f"{odd}, adapted"


def test_the_picture_alone_and_a_screenshot(report: Any, tmp_path: Path) -> None:
    (picture,) = measured(f"<html><head></head><body>{report.svg()}</body></html>")["pictures"]
    assert len(picture["after"]) == 6
    image = screenshot(report.html(), tmp_path / "page.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 20_000
