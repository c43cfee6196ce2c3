"""One-token decode over a quantised half-precision base does not round the projections first."""

import pytest

from vera_fx.branches.vera.costs import VeraCosts
from vera_fx.passes import CalledModule, ReadWeight, SiteGroup, Target, Workload, choose_plans


def is_exact(tokens: int, product: object, *, trains: bool = False, itemsize: int = 2) -> bool:
    target = Target("site", 768, 640, product, ("site.weight",))  # pyright: ignore[reportArgumentType]
    group = SiteGroup((("site", target),), (tokens,))
    work = Workload((16,), trains=trains, itemsize=itemsize)
    return choose_plans([group], [tokens], work, VeraCosts()).assignment.exact


def test_one_row_is_multiplied_by_the_projections_as_they_are() -> None:
    assert is_exact(1, CalledModule())


@pytest.mark.parametrize(
    ("tokens", "product", "trains", "itemsize"),
    [
        (2, CalledModule(), False, 2),
        (1, ReadWeight(), False, 2),
        (1, CalledModule(), True, 2),
        (1, CalledModule(), False, 4),
    ],
)
def test_all_else_is_as_ever(tokens: int, product: object, trains: bool, itemsize: int) -> None:
    assert not is_exact(tokens, product, trains=trains, itemsize=itemsize)
