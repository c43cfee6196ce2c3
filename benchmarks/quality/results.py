"""Results: a line of JSON for each run, appended, so that a killed run loses what it was at and no more."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "docs/quality.jsonl"

Result = dict[str, Any]


def read(path: Path = FILE) -> dict[str, Result]:
    """All runs by key. A last line that was cut short is left out."""
    if not path.is_file():
        return {}
    whole, _, _cut = path.read_text(encoding="utf-8").rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line["key"]: line["result"] for line in lines}


def append(path: Path, results: Mapping[str, Result]) -> None:
    """Add runs, in one write: several processes may append to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"key": key, "result": result}) for key, result in results.items())
    text = "".join(f"{row}\n" for row in rows)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        if cut:
            os.ftruncate(handle, _last_line(handle, size))
        os.write(handle, text.encode())
    finally:
        os.close(handle)


def _last_line(handle: int, size: int) -> int:
    """Where the line that was cut short begins."""
    return os.pread(handle, size, 0).rfind(b"\n") + 1


def chosen(results: Mapping[str, Result]) -> dict[tuple[bool, str], float]:
    """For images or not, and each method: the rate with the best mean validation accuracy.

    Ties go to the lower loss.
    """
    found: dict[tuple[bool, str, float], list[Result]] = {}
    for result in results.values():
        if result["stage"] == "sweep":
            key = result["task"] == "digits", result["method"], result["lr"]
            found.setdefault(key, []).append(result)
    scores = {
        key: (_mean(r["accuracy"] for r in rows), -_mean(r["loss"] for r in rows))
        for key, rows in found.items()
    }
    best: dict[tuple[bool, str], float] = {}
    for (image, name, rate), score in scores.items():
        other = best.get((image, name))
        if other is None or score > scores[image, name, other]:
            best[image, name] = rate
    return best


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
