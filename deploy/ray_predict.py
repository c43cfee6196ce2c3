"""Many rows, each by the adapter that it names: a classifier or an embedder over a dataset of Ray.

    python -m deploy.ray_predict path/to/model path/to/adapters rows.jsonl out/answers --replicas 4

Rows have a column with a text and one with an adapter's name. They are answered in batches that mix adapters, by
processes that hold one base each; all columns stay, and what is answered is beside them.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers otherwise

import pyarrow as pa
import ray
import typer

from vera_fx.checkpoint.saved import is_saved
from vera_fx.cli.main import reported
from vera_fx.errors import AdapterError, ConfigError, VeraFxError, listing
from vera_fx.recipes.base_models import check_folder

Choices = dict[str, Any]


class Predictor:
    """One process of a prediction: a base, the store, and tables to answer."""

    def __init__(
        self, model: Path, store: Path, text: str, adapter: str, threads: int, choices: Choices
    ) -> None:
        from vera_fx.cli.devices import device_of, use_threads
        from vera_fx.serving.folders import open_served

        use_threads(threads)
        device = device_of(choices.get("device", "auto"))
        self.served = open_served(model, store, **{**choices, "device": device, "shared": True})
        self.text, self.adapter = text, adapter

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with columns ``label`` and ``scores``, or ``vector``, behind its own."""
        texts, names = (_words(table, column) for column in (self.text, self.adapter))
        for name in dict.fromkeys(names):
            if name not in self.served.store:
                raise AdapterError(
                    f"a row asks for adapter {name!r}, which {self.served.store.folder} does not hold"
                )
        answers = self.served.answer(texts, names) if texts else []
        for column, values in self._columns(answers).items():
            table = table.append_column(column, values)
        return table

    def _columns(self, answers: list[Any]) -> dict[str, pa.Array]:
        labels = self.served.labels
        if not labels:
            vectors = [one.vector for one in answers]
            return {"vector": pa.array(vectors, pa.list_(pa.float64()))}
        scores = [dict(zip(labels, row, strict=True)) for row in answers]
        kind = pa.struct([(label, pa.float64()) for label in labels])
        best = [max(row, key=row.__getitem__) for row in scores]
        return {"label": pa.array(best, pa.string()), "scores": pa.array(scores, kind)}


def predict(
    rows: ray.data.Dataset,
    model: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    text: str = "text",
    adapter: str = "adapter",
    replicas: int = 1,
    batch: int = 32,
    cpus: float = 1,
    gpus: float = 0,
    **choices: Any,
) -> ray.data.Dataset:
    """The rows with what the model says to each, when they are asked for.

    Args:
        rows: with a column of texts and one of adapters' names.
        model: the model's folder, there on every machine.
        store: the folder with a folder for each adapter, there on every machine.
        text: name of the column with the texts.
        adapter: name of the column with the adapters' names.
        replicas: processes, each with the base in its memory.
        batch: rows of one call of the model.
        cpus: of each process, which also is how many threads torch has.
        gpus: of each process.
        choices: as for `vera_fx.serving.folders.open_served`: capacity, length, pooling, device.

    Returns:
        The rows with ``label`` and ``scores`` (by label), or ``vector``.

    Raises:
        ConfigError: a column is missing or would be overwritten, or a batch may name more adapters than are kept.
            What goes wrong while rows are answered is one of Ray's errors, with the words of ours in its text.
    """
    _check_columns(rows.columns() or [], text, adapter)
    capacity = choices.setdefault("capacity", 1024)
    if batch > capacity:
        raise ConfigError(
            f"batch is {batch}, but only {capacity} adapters are kept; raise capacity"
        )
    folders = (Path(model).absolute(), Path(store).absolute())  # processes run in other folders
    given = (*folders, text, adapter, max(1, int(cpus)), choices)
    return rows.map_batches(
        Predictor,
        fn_constructor_args=given,
        batch_size=batch,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=replicas),
        num_cpus=cpus,
        num_gpus=gpus,
    )


def _check_columns(found: list[str], text: str, adapter: str) -> None:
    for column in (text, adapter):
        if column not in found:
            raise ConfigError(f"there is no column {column!r}; found: {', '.join(found) or 'none'}")
    for column in ("label", "scores", "vector"):
        if column in found:
            raise ConfigError(f"a column {column!r} is to be written, and is there; rename it")


def _words(table: pa.Table, column: str) -> list[str]:
    values = table[column].to_pylist()
    if wrong := [value for value in values if not isinstance(value, str) or not value]:
        raise ConfigError(f"column {column!r} must hold texts, and holds {wrong[0]!r}")
    return values


def check_adapters(rows: ray.data.Dataset, store: Path, adapter: str = "adapter") -> None:
    """Look for every adapter that rows ask for, before hours of work: reads the one column.

    Raises:
        AdapterError: the folder does not hold one of them.
    """
    names = rows.select_columns([adapter]).unique(adapter)
    wanted = {name for name in names if isinstance(name, str)}
    there = {path.name for path in store.iterdir() if is_saved(path)}
    if missing := sorted(wanted - there):
        raise AdapterError(
            f"rows ask for {len(missing)} adapters that {store} does not hold: {listing(missing)}"
        )


_READ = {".jsonl": "read_json", ".csv": "read_csv", ".parquet": "read_parquet"}


@reported
def main(
    model: Annotated[Path, typer.Argument(help="the model's folder")],
    store: Annotated[Path, typer.Argument(help="folder with a folder for each adapter")],
    rows: Annotated[Path, typer.Argument(help="a JSONL, CSV or Parquet file")],
    output: Annotated[Path, typer.Argument(help="a new folder, for Parquet files")],
    text: Annotated[str, typer.Option(help="column of texts")] = "text",
    adapter: Annotated[str, typer.Option(help="column of adapters' names")] = "adapter",
    replicas: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="rows of one call")] = 32,
    cpus: Annotated[float, typer.Option(min=0, help="of each process")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="of each process")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, or one as cuda:0")] = "auto",
) -> None:
    """Answer the rows of a file, each by the adapter that it names."""
    if rows.suffix not in _READ or not rows.is_file():
        raise ConfigError(f"{str(rows)!r} is no file that ends in {', '.join(_READ)}")
    if output.exists():
        raise ConfigError(f"{str(output)!r} is there; give a folder that is not")
    options = {"replicas": replicas, "batch": batch, "cpus": cpus, "gpus": gpus, "device": device}
    check_folder(model)
    ray.init(ignore_reinit_error=True)
    read = getattr(ray.data, _READ[rows.suffix])(str(rows.absolute()))
    try:
        answered = predict(read, model, store, text=text, adapter=adapter, **options)
        check_adapters(read, store, adapter)
        answered.write_parquet(str(output.absolute()))
    except ray.exceptions.RayError as error:
        raise _ours(error) from None


def _ours(error: Exception) -> Exception:
    """The error of `vera_fx` that a process met, where there is one: Ray passes on its text alone."""
    found = re.findall(r"^vera_fx\.errors\.\w+: (.+)$", str(error), re.MULTILINE)
    return VeraFxError(found[-1]) if found else error


if __name__ == "__main__":
    typer.run(main)
