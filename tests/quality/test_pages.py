"""docs/quality.md, docs/recipes.md and docs/quality.svg say what docs/quality.jsonl holds."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import chart, facts, page, tables
from benchmarks.quality.results import FILE, chosen, read

RUNS = read()


@pytest.mark.parametrize("name", page.PAGES)
def test_pages_are_what_the_runs_give(name: str) -> None:
    assert (FILE.parent / name).read_text(encoding="utf-8") == page.page(name, RUNS)


def test_every_table_stands_in_a_page() -> None:
    words = "\n".join(path.read_text(encoding="utf-8") for path in page.WORDS.iterdir())
    asked = set(re.findall(r"^<([A-Z_]+)>$", words, re.MULTILINE))
    assert asked == set(tables.TABLES)


def test_every_figure_stands_in_a_sentence_and_is_the_runs() -> None:
    words = "\n".join(path.read_text(encoding="utf-8") for path in page.WORDS.iterdir())
    assert set(re.findall(r"<=(\w+)>", words)) == set(facts.FACTS)
    other = {key: _otherwise(run) for key, run in RUNS.items()}
    for name, fact in facts.FACTS.items():
        assert fact(other) != fact(RUNS), name


def _otherwise(run: dict[str, Any]) -> dict[str, Any]:
    """Two points more for VeRA at query and value, and more numbers in everything that trains."""
    mine = run["method"] in {"VeRA r=256", "VeRA r=64"} and run["stage"] in {"text", "images"}
    more = {"trained": run["trained"] + (60 if mine else 7)} if "trained" in run else {}
    return {**run, **more, "accuracy": run["accuracy"] + 0.02 * mine}


def test_a_changed_run_changes_the_page() -> None:
    key = next(key for key, run in RUNS.items() if run["stage"] == "text")
    changed = {**RUNS, key: {**RUNS[key], "accuracy": 0.123, "lr": RUNS[key]["lr"]}}
    assert page.page("quality.md", changed) != page.page("quality.md", RUNS)


def test_the_picture_has_the_runs_points() -> None:
    text = chart.PICTURE.read_text(encoding="utf-8")
    (found,) = re.findall(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
    assert [tuple(point) for point in json.loads(unescape(found))] == chart.points(RUNS)


def test_runs_took_the_rates_that_the_sweep_chose() -> None:
    from benchmarks.quality.methods import method

    best = chosen(RUNS)
    runs = [r for r in RUNS.values() if r["stage"] not in {"labels", "sweep", "alone"}]
    assert len(runs) > 60
    for run in runs:
        like = method(run["task"], run["method"]).like or run["method"]
        assert run["lr"] == best[run["task"] == "digits", like], run["method"]


def test_the_first_table_is_whole() -> None:
    """VeRA, LoRA and the head: four domains, five seeds."""
    for name in ("head", "VeRA r=256", "LoRA r=8"):
        for domain in tables.DOMAINS:
            found = tables.of(RUNS, stage="text", method=name, task=domain)
            assert [run["seed"] for run in found] == [0, 1, 2, 3, 4]


def test_counts_are_those_of_the_formula() -> None:
    """MiniLM: 12 sites of 384, a head of 770."""
    trained = {r["method"]: r["trained"] for r in RUNS.values() if r["stage"] == "text"}
    assert trained["VeRA r=256"] == 12 * (256 + 384) + 770
    assert trained["LoRA r=8"] == 12 * 8 * (384 + 384) + 770
    assert trained["head"] == 770


def test_the_readme_says_what_the_table_says() -> None:
    words = (FILE.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in tables.text(RUNS).splitlines()]
    means = {row[0]: row[-1].strip() for row in rows}
    numbers = {row[0]: row[2] for row in rows}
    for name in ("VeRA r=256", "LoRA r=8", "head"):
        assert re.search(rf"\b{means[name]} %", words), name
    assert numbers["VeRA r=256"] in words
    assert numbers["LoRA r=8"] in words


def run(**fields: Any) -> dict[str, Any]:
    plain = {
        "stage": "text",
        "task": "movies",
        "method": "full",
        "lr": 0.1,
        "seed": 0,
        "trained": 9,
    }
    return {**plain, **fields}


def test_spread_and_sizes() -> None:
    values = [0.5, 0.9, 0.625, 0.75, 0.7]
    assert tables.spread([run(accuracy=v) for v in values]) == "70.0 (50.0 to 90.0)"
    assert (
        tables.spread([run(accuracy=v) for v in values[:2]]) == "70.0 (50.0 to 90.0, 2 of 5 seeds)"
    )
    assert tables.spread([]) == "not run"
    assert tables.size(8450) == "33 KiB"
    assert tables.size(22_713_986) == "86.6 MiB"


def test_differences_are_paired_by_seed() -> None:
    runs = {
        f"{name}{seed}": run(method=name, seed=seed, accuracy=value)
        for name, values in {"VeRA r=256": (0.8, 0.7, 0.9), "full": (0.9, 0.6, 0.5)}.items()
        for seed, value in enumerate(values)
    }
    (row,) = [line for line in tables.differences(runs).splitlines() if line.startswith("| full")]
    assert row.split(" | ")[1:] == ["+10.0 (-10.0 to +40.0)", *["not run"] * 3, "2 / 0 / 1 |"]


def test_repository_file() -> None:
    assert Path(__file__).parents[2] / "docs/quality.jsonl" == FILE
