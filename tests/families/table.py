"""Pytest plugin (``-p tests.families.table``) that writes the matrix of families as a table.

Every cell is what `test_cell` recorded in this run. With a cell missing or a failed test nothing is
written.
"""

from pathlib import Path

import pytest
import torch

from tests.families.member import COLUMNS

HEAD = """# Model families

Written by `make families`; do not edit. Every cell is the result of a test of this run
(`tests/families/`), on tiny models with random weights, with torch {torch}, transformers
{transformers} and PEFT {peft} on the CPU.

| column | what was checked |
|---|---|
| capture | train and eval mode: every target has a site, outputs bit-equal to PEFT's with `plan="factored"` |
| train | gradients of every vector equal to PEFT's to rounding, both modes, `plan="factored"` and `"auto"` |
| generate | greedy and beam search give PEFT's tokens; at most four graphs, none more for other lengths |
| compile | `torch.compile(fullgraph=True)`: no break, one dynamic recompile per signature at most, none after |
| export | `export_program(form="constant")` gives the model's outputs, other batch sizes included |
| mixed | `adapter_names`: every row as its adapter alone computes it |

torch's own modules are compared with weights that the branch was folded into: PEFT adapts
`MultiheadAttention.out_proj` without effect.

"""


class Table:
    """The cells of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[tuple[str, str], str] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "teardown":
            for name, value in report.user_properties:
                if name == "cell":
                    family, column, text = value
                    self.cells[family, column] = text

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        from tests.families.test_matrix import MEMBERS

        names = [member.name for member in MEMBERS]
        missing = [f"{n}/{c}" for n in names for c in COLUMNS if (n, c) not in self.cells]
        if self.failed or missing:
            why = f"{len(self.failed)} tests failed; cells missing: {', '.join(missing) or 'none'}"
            terminalreporter.write_line(f"{self.path} is not written: {why}")
            return
        self.path.write_text(self.text(names), encoding="utf-8")
        terminalreporter.write_line(f"{self.path} written: {len(names)} families")

    def text(self, names: list[str]) -> str:
        """The page."""
        notes: list[str] = []
        lines = [f"| family | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
        for name in names:
            cells = [_short(self.cells[name, column], notes) for column in COLUMNS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        numbered = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
        return "\n".join([HEAD.format(**versions()) + "\n".join(lines), "", *numbered, ""])


def _short(text: str, notes: list[str]) -> str:
    """A cell: what works in a word, what does not with the number of its reason."""
    if text in {"yes", "n/a"}:
        return text
    if text not in notes:
        notes.append(text)
    word = next((word for word in ("not run", "in parts") if text.startswith(word)), "no")
    return f"{word} ({notes.index(text) + 1})"


def versions() -> dict[str, str]:
    """The versions that the matrix ran with."""
    import peft
    import transformers

    return {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write the matrix of families to this file")


def pytest_configure(config: pytest.Config) -> None:
    # Workers of xdist send their reports to the one process that writes.
    if config.getoption("--table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(config.getoption("--table")))
