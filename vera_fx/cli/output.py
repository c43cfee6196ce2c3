"""Prints what commands have found: JSON for programs, tables for people."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rich.console import Console
from rich.table import Table

Report = Mapping[str, Any]
"""Names of facts to numbers, texts, lists of rows (mappings with the same keys) or further reports."""


def show(report: Report, *, as_json: bool) -> None:
    """Print a report."""
    console = Console(soft_wrap=True)
    if as_json:
        console.print_json(json.dumps(report))
        return
    for name, value in report.items():
        if isinstance(value, list) and value:
            console.print(_table(name, cast("Sequence[Report]", value)))
        elif isinstance(value, Mapping):
            console.print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in value.items()))
        else:
            console.print(f"{name}: {value if value not in ([], None) else 'none'}")


def _table(name: str, rows: Sequence[Report]) -> Table:
    table = Table(*rows[0], title=name, title_justify="left")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table
