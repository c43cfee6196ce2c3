"""Commands over runs: train, look how good it is, ask it."""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vera_fx.cli.folders import check_new
from vera_fx.disk.files import moved_into
from vera_fx.errors import ConfigError
from vera_fx.recipes.recipe import Recipe


def train(out: Path, recipe: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Train by a recipe, its file and flags, and show how it goes."""
    wanted = Recipe.read(recipe, flags)
    _check_installed()
    from vera_fx.cli.progress import Live
    from vera_fx.recipes.train import train as train_run

    _hush()
    try:
        with Live() as live:
            return train_run(wanted, out, live.watch)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the last checkpoint\n")
        raise SystemExit(130) from None


def evaluate(run: Path, data: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a finished run over other data."""
    return _load(run, changes).evaluate(data)


def predict(
    run: Path,
    data: Path | None,
    texts: list[str],
    changes: Mapping[str, Any],
    new_tokens: int | None,
) -> Iterator[dict[str, Any]]:
    """Answers of a finished run to the rows of a file, or to texts."""
    if (data is None) != bool(texts):
        raise ConfigError("give what to predict from: a file or folder, or texts with --text")
    finished = _load(run, changes)
    if new_tokens is not None:
        finished = finished.with_new_tokens(new_tokens)
    return finished.ask(texts) if data is None else finished.predict(data)


def write(answers: Iterator[dict[str, Any]], out: Path | None) -> int | None:
    """Write answers as JSON lines; how many, or None if they went to stdout.

    A file appears when all are in it.
    """
    if out is None:
        for answer in answers:
            sys.stdout.write(f"{json.dumps(answer, ensure_ascii=False)}\n")
            sys.stdout.flush()
        return None
    check_new(out)
    count = 0
    with moved_into(out.parent) as aside, (aside / out.name).open("w", encoding="utf-8") as file:
        for answer in answers:
            file.write(f"{json.dumps(answer, ensure_ascii=False)}\n")
            count += 1
    return count


def _load(run: Path, changes: Mapping[str, Any]) -> Any:
    _check_installed()
    from vera_fx.recipes.finished import Finished

    _hush()
    return Finished.load(run, changes)


def _check_installed() -> None:
    """Refuse to begin without what reads data.

    Raises:
        ConfigError: with the extra that brings it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("datasets is not installed; pip install 'vera-fx[train]'") from error
    datasets.disable_progress_bars()


def _hush() -> None:
    """Keep transformers from telling of heads that a recipe makes and trains on purpose."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
