"""Rows from files and folders, by their canonical columns, and the part of them that is held out."""

import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vera_fx.errors import ConfigError, first_line, listing, nearest

Rows = Any
"""A ``datasets.Dataset``: rows by number, each a mapping of columns to values."""

TRAIN, EVAL = "train", "eval"
_EVAL_SPLITS = ("validation", "valid", "dev", "test", EVAL)
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    # Words such as "NA" and "None" are words.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": 3}),
    ".parquet": ("parquet", {}),
}


def read(path: Path) -> dict[str, Rows]:
    """The rows of a file or folder, under ``"train"``, and ``"eval"`` if it has a split for that.

    Args:
        path: a JSONL, JSON, CSV, TSV or Parquet file (gzipped or not), a folder that ``datasets``
            saved, or one with a folder of pictures for every class.

    Raises:
        ConfigError: it is none of these, is damaged, or holds no rows.
    """
    try:
        found = _read_folder(path) if path.is_dir() else {TRAIN: _read_file(path)}
    except ConfigError:
        raise
    except Exception as error:  # whatever the readers of datasets, pandas and pyarrow raise
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise ConfigError(f"{path} has no rows") from error
        raise ConfigError(f"{path} cannot be read: {first_line(error)}") from error
    for name, rows in found.items():
        if not len(rows):
            raise ConfigError(f"{path} has no rows{' to evaluate on' * (name == EVAL)}")
    return found


def _read_file(path: Path) -> Rows:
    import datasets

    if not path.is_file():
        raise ConfigError(f"there is no file or folder {path}")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in _READERS:
        raise ConfigError(
            f"{path} must end in {listing(_READERS)}, optionally with .gz, or be a folder of datasets "
            "or of pictures"
        )
    reader, options = _READERS[suffix]
    return datasets.load_dataset(reader, data_files=str(path), split="train", **options)


def _read_folder(path: Path) -> dict[str, Rows]:
    import datasets

    names = {entry.name for entry in path.iterdir()}
    if not names & {"dataset_dict.json", "state.json"}:
        return {TRAIN: _pictures(path)}
    found = datasets.load_from_disk(str(path))
    if not isinstance(found, datasets.DatasetDict):
        return {TRAIN: found}
    chosen = next((name for name in (TRAIN, *_EVAL_SPLITS) if name in found), None)
    if chosen is None:
        raise ConfigError(f"{path} has the splits {listing(map(str, found))}, and none is 'train'")
    held = next((name for name in _EVAL_SPLITS if name in found and name != chosen), None)
    return {TRAIN: found[chosen], **({EVAL: found[held]} if held else {})}


def _pictures(path: Path) -> Rows:
    """The pictures of a folder, or of one folder for each class below it."""
    import datasets

    files = [file for file in sorted(path.glob("*/*")) if file.suffix.lower() in _PICTURES]
    if files:
        labels = [file.parent.name for file in files]
        return datasets.Dataset.from_dict({"image": list(map(str, files)), "label": labels})
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in _PICTURES]
    if files:
        return datasets.Dataset.from_dict({"image": list(map(str, files))})
    raise ConfigError(
        f"the folder {path} was not saved by datasets, and holds no pictures, nor a folder of "
        "pictures for every class"
    )


def with_columns(rows: Rows, wanted: tuple[str, ...], called: Mapping[str, str]) -> Rows:
    """Rows with the wanted columns alone, under these names.

    Args:
        rows: the rows.
        wanted: the columns.
        called: what a column is called in the data, where that is another name.

    Raises:
        ConfigError: one is not there, or has rows without a value.
    """
    there = {name: called.get(name, name) for name in wanted}
    for name, column in there.items():
        if column not in rows.column_names:
            raise ConfigError(
                f"the data has no column {column!r}{nearest(column, rows.column_names)}; it has "
                f"{listing(rows.column_names)}; say what {name!r} is called there: --column {name}=..."
            )
    rows = rows.select_columns(list(there.values()))
    rows = rows.rename_columns({column: name for name, column in there.items() if name != column})
    for name in wanted:
        _check_values(rows, name)
    return rows


def _check_values(rows: Rows, name: str) -> None:
    empty = rows.data.column(name).null_count
    if empty:
        number = next(n for n, value in enumerate(rows[name]) if value is None)
        raise ConfigError(
            f"{empty} rows have no {name!r} (the first is row {number + 1}); leave them out"
        )


def split(rows: Rows, held_out: float, seed: int) -> tuple[Rows, Rows | None]:
    """Rows to train on and rows to evaluate on, by chance.

    Args:
        rows: all rows.
        held_out: a share below 1, or a number of rows; 0 for none.
        seed: of the choice.

    Raises:
        ConfigError: nothing would be left for one of the two.
    """
    if not held_out:
        return rows, None
    count = round(held_out * len(rows)) if held_out < 1 else round(held_out)
    if not 0 < count < len(rows):
        raise ConfigError(
            f"held_out={held_out:g} of {len(rows)} rows leaves {max(len(rows) - count, 0)} to train on and "
            f"{min(count, len(rows))} to evaluate on; give another, or eval_data"
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return rows.select(order[count:]), rows.select(order[:count])


def fingerprint(path: Path) -> str:
    """What tells data or a model from another under the same path.

    Names and sizes of files, and of a single file its content as well.
    """
    found = hashlib.sha256()
    for file in _files(path):
        found.update(f"{file.relative_to(path)}:{file.stat().st_size}\n".encode())
    if path.is_file():
        with path.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(path):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))
