"""The documentation's tables of figures as JSON, with the commands that measured them; and its charts.

python -m benchmarks.figures take    # after a table has changed: read it into docs/figures/tables/
python -m benchmarks.figures draw    # draw docs/figures/*.svg from what was taken

Whoever adds a table adds its command: `take` writes an empty one, which a test refuses.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from benchmarks.bars import Bars, drawn

DOCS = Path(__file__).parents[1] / "docs"
TABLES = DOCS / "figures" / "tables"
APART = {"index.md"}
"""A page whose rows name their runs themselves."""

_TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)
_FIGURE = re.compile(r"\**[\d.,]+(?: ?[%A-Za-z/]{1,4})?(?: \(.*\))?\**")
_LEAST = 3

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Table:
    """One table of figures.

    Attributes:
        heading: the section that it stands in.
        command: what measured it.
        kept: the file of ``docs/figures/runs`` with the run's own output; or
            ``"table"``: the output is not kept, the page's table is all there is.
        rows: the cells, header first.
    """

    heading: str
    command: str
    kept: str
    rows: tuple[tuple[str, ...], ...]


def tables_in(text: str) -> Iterator[tuple[str, tuple[tuple[str, ...], ...]]]:
    """The heading and the cells of every table with at least three figures."""
    for match in _TABLE.finditer(text):
        rows = tuple(map(_cells, match[0].splitlines()))
        figures = sum(bool(_FIGURE.fullmatch(cell)) for row in rows[2:] for cell in row)
        if figures >= _LEAST:
            heading = re.findall(r"^#+ (.+)$", text[: match.start()], re.MULTILINE)[-1]
            yield heading, (rows[0], *rows[2:])


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip()[1:-1].split("|"))


def known(page: str) -> list[Table]:
    """What was taken of a page."""
    path = TABLES / f"{page}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [Table(**{**t, "rows": tuple(map(tuple, t["rows"]))}) for t in found]


def pages_with_figures() -> Iterator[tuple[Path, list[tuple[str, tuple[tuple[str, ...], ...]]]]]:
    """Every page that has tables of figures, and these."""
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        found = list(tables_in(text))
        if found and path.name not in APART and not is_written(text):
            yield path, found


def is_written(text: str) -> bool:
    """True if a command writes the page as a whole, as it says at its head; its own test holds it to that."""
    return re.search(r"[Ww]ritten\s+by\s+`", text[:1500]) is not None


@app.command()
def take() -> None:
    """Read the pages' tables into JSON; commands stay with their section and header."""
    TABLES.mkdir(parents=True, exist_ok=True)
    for path, found in pages_with_figures():
        name = path.relative_to(DOCS).with_suffix("").as_posix().replace("/", ".")
        before = {(table.heading, table.rows[0]): table for table in known(name)}
        taken = []
        for heading, rows in found:
            old = before.get((heading, rows[0]), Table(heading, "", "table", ()))
            taken.append(asdict(Table(heading, old.command, old.kept, rows)))
        text = json.dumps(taken, indent=1, ensure_ascii=False) + "\n"
        (TABLES / f"{name}.json").write_text(text, encoding="utf-8")


def charts() -> dict[str, str]:
    """Every chart by its file's name."""
    tables = {table.heading: table for table in known("benchmarks")}
    training, memory, first = (tables[name] for name in ("Training", "Memory", "The first step"))
    switch = next(t for t in known("many_adapters") if t.kept == "switch.json")
    return {
        "training.svg": drawn(
            "A compiled training step, as a share of PEFT's",
            [Bars(f"{_case(r)}, {r[1]} tokens", (_number(r[2]),)) for r in _filled(training)],
            ("vera_fx",),
            mark=1.0,
        ),
        "memory.svg": drawn(
            "Peak memory of a step beyond the frozen base, as a share of PEFT's",
            [Bars(f"{_case(r)}, {r[1]} tokens", (_share(r[6]), _lora(r))) for r in memory.rows[1:]],
            ("vera_fx", "LoRA r=8"),
            mark=1.0,
        ),
        "first_step.svg": drawn(
            "Seconds of the first compiled step, caches empty",
            [
                Bars(
                    f"{_case(r)}, {r[1]} layers", tuple(_number(r[c].split(",")[0]) for c in (5, 3))
                )
                for r in first.rows[1:]
            ],
            ("vera_fx", "PEFT"),
        ),
        "switch.svg": drawn(
            "Microseconds of a switch between adapters",
            [
                Bars(f"{r[0]} layers, {r[1]} adapters", (_number(r[2]), _number(r[4])))
                for r in switch.rows[1:]
            ],
            ("vera_fx", "PEFT"),
            logarithmic=True,
        ),
    }


def _filled(table: Table) -> list[tuple[str, ...]]:
    """A table's rows, with "the same" written out."""
    rows, base = [], ""
    for first, *rest in table.rows[1:]:
        base = base if first.startswith("the same") else first
        rows.append((first.replace("the same", base), *rest))
    return rows


def _case(row: tuple[str, ...]) -> str:
    short = {
        " shape": "",
        "query and value": "q, v",
        ", two layers": "",
        "four layers, gradient ": "",
    }
    text = row[0]
    for long, instead in short.items():
        text = text.replace(long, instead)
    return text


def _share(cell: str) -> float:
    return 0.0 if cell == "as the floor" else _number(cell)


def _lora(row: tuple[str, ...]) -> float:
    floor, peft, lora = (_number(row[column]) for column in (2, 3, 4))
    return (lora - floor) / (peft - floor)


def _number(cell: str) -> float:
    return float(cell.replace(",", "").strip("*"))


@app.command()
def draw() -> None:
    """Draw the charts."""
    for name, picture in charts().items():
        (DOCS / "figures" / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    app()
