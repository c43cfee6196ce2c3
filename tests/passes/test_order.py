"""The order of passes is one literal tuple; what runs and what the README says agree with it."""

import re
from pathlib import Path

from vera_fx.passes import (
    FOR_EXPORTS,
    ORDER,
    AdaptationPlan,
    Assignment,
    OutlineLayers,
    adaptation,
    cleanup,
    training,
)

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_passes_run_in_that_order() -> None:
    plan, assignment = AdaptationPlan((), ()), Assignment()
    passes = (*cleanup(), *adaptation(plan, assignment), *training(assignment, OutlineLayers()))

    assert tuple(map(type, passes)) == ORDER


def test_the_readme_lists_them_in_that_order() -> None:
    (table,) = re.findall(
        r"^\| pass \| what it does \|\n\|---\|---\|\n((?:\|.*\n)+)", README, re.MULTILINE
    )
    listed = [
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]

    assert listed == [kind.__name__ for kind in (*ORDER, *FOR_EXPORTS)]
