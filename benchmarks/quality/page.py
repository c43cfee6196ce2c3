"""Writes docs/quality.md and docs/recipes.md: python -m benchmarks.quality.page.

Their words stand in `pages/`; ``<NAME>`` there is a table of `benchmarks.quality.tables`, and ``<=name>``
a figure of `benchmarks.quality.facts`.
"""

import re
from pathlib import Path

from benchmarks.quality.facts import FACTS
from benchmarks.quality.results import FILE, read
from benchmarks.quality.tables import TABLES, Runs

WORDS = Path(__file__).parent / "pages"
PAGES = ("quality.md", "recipes.md")


def page(name: str, runs: Runs) -> str:
    """A page from the runs.

    Raises:
        KeyError: its words ask for a table or a figure that there is not.
    """
    words = (WORDS / name).read_text(encoding="utf-8")
    words = re.sub(r"<=(\w+)>", lambda found: FACTS[found[1]](runs), words)
    return re.sub(r"^<([A-Z_]+)>$", lambda found: TABLES[found[1]](runs), words, flags=re.MULTILINE)


def main() -> None:
    """Write both pages."""
    runs = read()
    for name in PAGES:
        (FILE.parent / name).write_text(page(name, runs), encoding="utf-8")


if __name__ == "__main__":
    main()
