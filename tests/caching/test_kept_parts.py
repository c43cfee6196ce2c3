"""Parts whose captures were kept by another process: shared no further than what they ask for allows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vera_fx
from tests.caching.test_equal_parts import (
    Branching,
    ByDict,
    Layer,
    Numbered,
    X,
    adapted,
    assert_right,
    by_hooks,
    exports,
)
from tests.helpers import assert_close

__all__ = ["exports"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with pytest.warns(vera_fx.PartialCaptureWarning):
        yield


@pytest.mark.parametrize("kind", [Layer, Numbered, ByDict])
def test_a_second_model_reads_all_and_is_right(
    kind: type[Layer], tmp_path: Path, exports: Callable[[], int]
) -> None:
    base = Branching(kind).eval()
    with vera_fx.capture_cache(tmp_path):
        first = adapted(base)
        assert_right(first)
        made = exports()
        again = adapted(base)
        assert_right(again)
        # A part that took a capture over kept none: the first of these is captured, for the others.
        assert exports() == made + (kind is Layer)
    assert_close(again(X), by_hooks(first, X))
