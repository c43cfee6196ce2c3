"""Benchmarks and examples import, so that none of them calls what has moved or gone."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if path.name not in {"__init__.py", "__main__.py"}
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as for a script that is run there
    if name == "benchmarks.chart":
        pytest.importorskip("matplotlib")
    assert importlib.import_module(name).__doc__
