"""Batch prediction by Ray Data: every row by the adapter it names, as in process. `make test-ray` brings Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is an extra of its own: make test-ray")

import pyarrow.parquet as pq

from deploy.ray_predict import check_adapters, predict
from tests.deploy import worlds
from vera_fx.errors import AdapterError, ConfigError

ROOT = Path(__file__).parents[2]
ROWS = [
    {"id": number, "text": worlds.TEXTS[number % 3], "adapter": f"a{number // 3 % 3}"}
    for number in range(18)
]
SIZES = {"replicas": 1, "cpus": 0.5}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.classifier(tmp_path_factory.mktemp("judged"), 3)


def answered(rows: Any, root: Path, **options: Any) -> list[dict[str, Any]]:
    found = predict(rows, root / "model", root / "store", **{**SIZES, **options})
    return sorted(found.take_all(), key=lambda row: row["id"])


def assert_scores(found: list[dict[str, Any]], root: Path) -> None:
    expected = {
        (name, text): worlds.scores(root, name, text)
        for name in ("a0", "a1", "a2")
        for text in worlds.TEXTS
    }
    assert len({round(row[0], 3) for row in expected.values()}) == len(expected)
    for row, given in zip(found, ROWS, strict=True):
        assert {name: row[name] for name in given} == given
        wanted = expected[given["adapter"], given["text"]]
        assert list(row["scores"]) == list(worlds.LABELS)
        assert list(row["scores"].values()) == pytest.approx(wanted, abs=1e-5)
        assert row["label"] == worlds.LABELS[wanted.index(max(wanted))]


def test_a_classifier_over_two_processes_and_uneven_batches(cluster: Any, judged: Path) -> None:
    rows = cluster.data.from_items(ROWS, override_num_blocks=3)
    assert_scores(answered(rows, judged, replicas=2, batch=4), judged)


def test_an_embedder_and_columns_of_other_names(cluster: Any, tmp_path: Path) -> None:
    root = worlds.embedder(tmp_path, 2)
    given = [{"id": n, "words": text, "by": f"a{n % 2}"} for n, text in enumerate(worlds.TEXTS)]
    rows = cluster.data.from_items(given)

    found = answered(rows, root, text="words", adapter="by", length=50)

    for row, line in zip(found, given, strict=True):
        assert list(row["vector"]) == pytest.approx(
            worlds.vector(root, line["by"], line["words"]), abs=1e-5
        )
    assert list(found[0]["vector"]) != pytest.approx(
        worlds.vector(root, "a1", worlds.TEXTS[0]), abs=1e-2
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter": "nobody"}, "AdapterError: a row asks for adapter 'nobody'"),
        ({"text": None}, "ConfigError: column 'text' must hold texts, and holds None"),
    ],
)
def test_a_row_that_cannot_be_answered_ends_it_with_words(
    cluster: Any, judged: Path, change: dict[str, Any], words: str
) -> None:
    rows = cluster.data.from_items([*ROWS[:2], {**ROWS[2], **change}])
    with pytest.raises(cluster.exceptions.RayTaskError, match=words):
        answered(rows, judged)


def test_adapters_that_are_not_there_are_found_beforehand(cluster: Any, judged: Path) -> None:
    check_adapters(cluster.data.from_items(ROWS), judged / "store")
    rows = cluster.data.from_items([*ROWS, {**ROWS[0], "adapter": "../a0"}])
    with pytest.raises(AdapterError, match="1 adapters that .*store does not hold: '?../a0"):
        check_adapters(rows, judged / "store")


def test_wrong_columns_and_sizes_before_anything_runs(cluster: Any, judged: Path) -> None:
    rows = cluster.data.from_items(ROWS)
    with pytest.raises(ConfigError, match="no column 'by'; found: id, text, adapter"):
        answered(rows, judged, adapter="by")
    with pytest.raises(ConfigError, match="batch is 9, but only 8"):
        answered(rows, judged, batch=9, capacity=8)
    taken = cluster.data.from_items([{**ROWS[0], "scores": 1}])
    with pytest.raises(ConfigError, match="'scores' is to be written"):
        answered(taken, judged)


def run(*parts: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.ray_predict", *map(str, parts)]
    return subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )


def test_the_command(cluster: Any, judged: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parts = (judged / "model", judged / "store", file, tmp_path / "out", "--cpus", 0.5)

    done = run(*parts)

    assert done.returncode == 0, done.stderr[-3000:]
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert_scores(sorted(found, key=lambda row: row["id"]), judged)
    again = run(*parts)
    assert (again.returncode, again.stderr.strip().splitlines()[-1]) == (
        1,
        f"error: {str(tmp_path / 'out')!r} is there; give a folder that is not",
    )


def test_an_error_in_a_process_is_a_line(cluster: Any, judged: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    parts = (judged / "model", judged / "store", file, tmp_path / "out", "--cpus", 0.5)

    done = run(*parts, "--device", "odd")

    assert done.returncode == 1, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last == "error: device is auto, cpu, or one as cuda:0, not 'odd'"
