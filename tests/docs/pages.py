"""Pages taken apart: fences with what their info strings say, links, headings.

A fence of Python runs (`tests/docs/test_blocks.py`). Its info string may say more::

    ```python given="bert"             names that are there, by `tests/docs/given.py`
    ```python skip="needs a GPU"       it is not run, and why
    ```text prints                     what the Python above it prints, to the letter
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_OPTION = re.compile(r'(\w+)(?:="([^"]*)")?')


@dataclass(frozen=True)
class Fence:
    """One block between fences."""

    page: str
    line: int
    language: str
    options: dict[str, str]
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """The README and every page of the documentation."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    """A page's path from the repository's root."""
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(page: Path) -> list[Fence]:
    """All fences of a page, in order."""
    text, found = text_of(page), []
    for match in _FENCE.finditer(text):
        language, _, rest = match[2].strip().partition(" ")
        options = dict(_OPTION.findall(rest))
        line = text.count("\n", 0, match.start()) + 1
        found.append(Fence(name_of(page), line, language, options, textwrap.dedent(match[3])))
    return found


def prose(page: Path) -> str:
    """A page without its fences and code spans."""
    return re.sub(r"`[^`\n]*`", "``", _FENCE.sub("", text_of(page)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", text_of(page)), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
        found.add(plain.strip().replace(" ", "-"))
    return found
