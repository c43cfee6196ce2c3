"""Rows from every kind of file and folder, and what is refused."""

import gzip
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.recipes import tiny
from vera_fx.errors import ConfigError
from vera_fx.recipes import data
from vera_fx.recipes.tasks.labels import classes_of, indices, with_label_texts

ROWS = [{"text": "NA", "label": "x"}, {"text": 'say "hi"', "label": "None"}]


def as_list(rows: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in rows]


def test_files(tmp_path: Path) -> None:
    """Words that readers take for missing values stay words; quotes of TSV are text."""
    tiny.jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text('text,label\nNA,x\n"say ""hi""",None\n')
    with gzip.open(tmp_path / "c.tsv.gz", "wt") as file:
        file.write('text\tlabel\nNA\tx\nsay "hi"\tNone\n')
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.csv", "c.tsv.gz", "d.parquet"):
        assert as_list(data.read(tmp_path / name)["train"]) == ROWS, name


def test_folders(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    assert as_list(data.read(tmp_path / "one")["train"]) == ROWS
    splits = datasets.DatasetDict({"train": table, "validation": table.select([1])})
    splits.save_to_disk(tmp_path / "two")
    found = data.read(tmp_path / "two")
    assert as_list(found["eval"]) == ROWS[1:]
    assert len(found["train"]) == 2
    made = data.read(tiny.pictures(tmp_path / "three", 2))["train"]
    assert made["label"] == ["bright", "bright", "dark", "dark", "red", "red"]
    assert Path(made[0]["image"]) == tmp_path / "three" / "bright" / "0.png"


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": \n')
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "c.csv").write_text("text,label\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "f.jsonl").touch()
    for name, words in {
        "a.jsonl": "cannot be read",
        "b.txt": "must end in",
        "c.csv": "no rows",
        "f.jsonl": "no rows",
        "d": "holds no pictures",
        "e.csv": "no file or folder",
    }.items():
        with pytest.raises(ConfigError, match=words):
            data.read(tmp_path / name)


def test_columns() -> None:
    rows = datasets.Dataset.from_list(
        [{"body": "a", "y": 1, "z": 2}, {"body": "b", "y": None, "z": 3}]
    )
    found = data.with_columns(rows, ("text",), {"text": "body"})
    assert as_list(found) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(ConfigError, match="no column 'text'.*'body', 'y', 'z'.*--column text="):
        data.with_columns(rows, ("text",), {})
    with pytest.raises(ConfigError, match="1 rows have no 'label'.*row 2"):
        data.with_columns(rows, ("label",), {"label": "y"})


def test_splits_are_by_chance_and_the_same_again() -> None:
    rows = datasets.Dataset.from_dict({"n": list(range(50))})
    train, held = data.split(rows, 0.2, seed=1)
    assert len(held) == 10
    assert sorted([*train["n"], *held["n"]]) == list(range(50))
    assert list(held["n"]) != list(range(10))
    assert list(data.split(rows, 10, seed=1)[1]["n"]) == list(held["n"])
    assert list(data.split(rows, 10, seed=2)[1]["n"]) != list(held["n"])
    assert data.split(rows, 0, seed=1)[1] is None
    for wrong in (50, 0.001):
        with pytest.raises(ConfigError, match="held_out"):
            data.split(rows, wrong, seed=1)


def test_labels() -> None:
    def classes(values: list[Any]) -> tuple[str, ...]:
        return classes_of(
            with_label_texts(datasets.Dataset.from_dict({"label": values, "n": values}))
        )

    assert classes([10, 9, 10]) == ("9", "10")
    assert classes(["b", "a"]) == ("a", "b")
    assert classes([True, False]) == ("False", "True")
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["dog", "cat"]), "n": datasets.Value("int64")}
    )
    rows = datasets.Dataset.from_dict({"label": [1, 0], "n": [5, 6]}, features=features)
    assert list(with_label_texts(rows)["label"]) == ["cat", "dog"]
    assert indices(["b", "a"], ("a", "b")).tolist() == [1, 0]
    with pytest.raises(ConfigError, match="'c' is none of the classes"):
        indices(["c"], ("a", "b"))
    with pytest.raises(ConfigError, match="1 different values"):
        classes(["a", "a"])
    with pytest.raises(ConfigError, match=r"got 0\.5"):
        classes([0.5, 1.0])
