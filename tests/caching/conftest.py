"""Counts exports: a capture that comes from the folder is one that was not exported."""

from collections.abc import Callable

import pytest

from vera_fx.caching import captures


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many calls were exported since the last question."""
    made: list[int] = []
    original = captures.export_call

    def counted(*args: object) -> object:
        made.append(1)
        return original(*args)  # type: ignore[arg-type]

    def count() -> int:
        found = len(made)
        made.clear()
        return found

    monkeypatch.setattr(captures, "export_call", counted)
    return count
