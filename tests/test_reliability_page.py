"""docs/reliability.md keeps its word: the tests and the cases that it names exist."""

import ast
import re
from pathlib import Path

from tests.capturing.test_never_stale import CHANGES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def names_in(path: Path) -> set[str]:
    """Every test and class of tests in a file."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = (n.name for n in tree if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return {name for name in found if name.lower().startswith("test")}


def test_every_test_that_is_named_exists() -> None:
    known = set[str]().union(*(names_in(path) for path in (ROOT / "tests").rglob("test_*.py")))
    named = set(re.findall(r"`(?:tests/\S+?::)?([Tt]est_?[A-Za-z]\w*)`", PAGE))
    assert len(named) > 25
    assert sorted(named - known) == []


def test_every_file_that_is_named_exists_and_has_the_test() -> None:
    for file, _, name in re.findall(r"`(tests/[\w/]+(?:\.py)?)(::(\w+))?`", PAGE):
        assert (ROOT / file).exists(), file
        assert not name or name in names_in(ROOT / file), f"{file}::{name}"


def test_every_kind_of_change_stands_in_a_row() -> None:
    rows = PAGE[: PAGE.index("**What leaves no mark**")]
    kinds = {kind.partition(":")[0] for kind in CHANGES}
    assert {k for k in kinds if k.split()[0] not in rows} == set()
