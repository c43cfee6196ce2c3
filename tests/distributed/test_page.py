"""docs/distributed.md keeps its word: the tests and files that it names exist."""

import re
from pathlib import Path

from tests.test_reliability_page import names_in

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_exists() -> None:
    files = (*(ROOT / "tests/distributed").glob("test_*.py"), *(ROOT / "tests/model").glob("*.py"))
    known = set[str]().union(*map(names_in, files))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 12
    assert sorted(named - known) == []


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"((?:tests|examples)/[\w/]+\.(?:py|yaml))", PAGE)
    assert len(set(named)) > 7
    assert [name for name in named if not (ROOT / name).is_file()] == []
