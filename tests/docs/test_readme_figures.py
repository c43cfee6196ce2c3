"""Figures in the sentences of README.md and docs/index.md are those of committed files."""

import re
from pathlib import Path

from benchmarks.figures import DOCS, known
from tests.families import table
from tests.families.test_matrix import MEMBERS

README = (DOCS.parent / "README.md").read_text(encoding="utf-8")


def said(pattern: str) -> tuple[str, ...]:
    """The groups of the one place that the pattern fits."""
    (found,) = re.finditer(pattern, README)
    return found.groups()


def column(heading: str, cases: str, number: int) -> list[str]:
    """Cells of a table of docs/benchmarks.md, of the rows whose case begins so, and "the same" below it."""
    (rows,) = (t.rows[1:] for t in known("benchmarks") if t.heading == heading)
    found, inside = [], False
    for row in rows:
        inside = row[0].startswith(cases) or (inside and row[0] == "the same")
        if inside:
            found.append(row[number])
    return found


def test_compiled_steps_in_bfloat16() -> None:
    shares = column("Training", "bfloat16", 2)
    assert len(shares) == 5
    assert said(r"compiled bf16 steps take ([\d.]+) to ([\d.]+) of PEFT's time") == (
        min(shares),
        max(shares),
    )


def test_the_first_compiled_step() -> None:
    (rows,) = (t.rows[1:] for t in known("benchmarks") if t.heading == "The first step")
    shares = tuple(sorted(row[6] for row in rows if row[1] == "12"))
    assert said(r"each kind of layer once: ([\d.]+) and ([\d.]+) of PEFT's time") == shares


def test_families() -> None:
    assert said(r"Which of (\d+) model families capture") == (str(len(MEMBERS)),)
    assert table.__file__


def test_the_demo_trains_what_its_model_has() -> None:
    """Accuracies of the demo are of one run, and stand in no file: they are not looked at here."""
    assert said(r"with ([\d,]+) trainable parameters") == (f"{12 * (256 + 384) + 2 * 384 + 2:,}",)
    assert Path(DOCS.parent / "examples" / "finetune.py").is_file()
