"""Reads labelled sentences from TSV, CSV or JSONL files, gzipped or not."""

import csv
import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """A file that cannot be used, with the reason and the remedy."""


@dataclass(frozen=True)
class Example:
    """One sentence and the index of its class."""

    text: str
    label: int


@dataclass(frozen=True)
class Dataset:
    """Examples split for training and held out, and the names of the classes."""

    train: list[Example]
    held_out: list[Example]
    classes: list[str]


def read_dataset(
    path: Path, *, text: str, label: str, ratings: bool, held_out: int, seed: int
) -> Dataset:
    """Read, shuffle and split a file.

    Args:
        path: a ``.tsv``, ``.csv`` or ``.jsonl`` file, optionally with ``.gz``.
        text: name of the column that holds the sentence.
        label: name of the column that holds the class, or the rating.
        ratings: the label is a number; its sign is the class, and near-zero ones are dropped.
        held_out: number of examples to keep for evaluation.
        seed: of the shuffle.

    Raises:
        DataError: the file is missing, empty, or lacks a column, a class or enough rows.
    """
    rows = _rows(path, text, label)
    if ratings:
        rated = [(row[text], _number(row[label], label, path)) for row in rows]
        pairs = [
            (t, "positive" if value > 0 else "negative") for t, value in rated if abs(value) >= 0.5
        ]
    else:
        pairs = [(row[text], str(row[label])) for row in rows]
    classes = sorted({name for _, name in pairs})
    if len(classes) < 2:
        raise DataError(
            f"{path}: column {label!r} has {len(classes)} class(es); at least two are needed"
        )
    if len(pairs) <= held_out:
        raise DataError(f"{path} has {len(pairs)} usable rows, too few to hold out {held_out}")
    examples = [Example(t, classes.index(name)) for t, name in pairs]
    random.Random(seed).shuffle(examples)
    return Dataset(examples[held_out:], examples[:held_out], classes)


def _rows(path: Path, text: str, label: str) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in {"tsv", "csv", "jsonl"}:
        raise DataError(f"{path} must end in .tsv, .csv or .jsonl, optionally with .gz")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            if kind == "jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
                rows = list(csv.DictReader(file, **style))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error}") from error
    if not rows:
        raise DataError(f"{path} is empty")
    for column in (text, label):
        if column not in rows[0]:
            raise DataError(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, rows[0]))}"
            )
    return [row for row in rows if row.get(text) and row.get(label) not in {None, ""}]


def _number(value: str, column: str, path: Path) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(
            f"{path}: {value!r} in column {column!r} is no rating (use --classes)"
        ) from None
