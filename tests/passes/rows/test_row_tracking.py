"""Which row every position belongs to: the right adapter for it, or a refusal; never another."""

import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import vera_fx
from tests.helpers import assert_close, assert_far_apart
from tests.mixing.test_mixed import BASE, alone, fill_all
from tests.passes.rows.row_programs import KEEPING, LOSING, TOKENS, WIDTH, Program

NAMES = ("a", "b", BASE)


def adapted(steps: Sequence[str]) -> nn.Module:
    torch.manual_seed(0)
    options = {"target_modules": ["layers"], "plan": "factored"}
    targets = [f"layers.{number}" for number in range(len(steps))]
    config = vera_fx.VeraConfig(r=3, target_modules=targets, plan="factored")
    model = vera_fx.adapt(Program(steps).double().eval(), config, adapter_name="a")
    vera_fx.add_adapter(
        model, "b", vera_fx.VeraConfig(r=2, **(options | {"target_modules": targets}))
    )
    fill_all(model)
    return model


def check(steps: Sequence[str], names: Sequence[str]) -> None:
    model = adapted(steps)
    x = torch.randn(len(names), TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        mixed = model(x, adapter_names=list(names))
        each = {name: alone(model, name, {"x": x}) for name in dict.fromkeys(names)}
        for row, name in enumerate(names):
            assert_close(mixed[row], each[name][row], what=f"{steps}, row {row}, {name}")
        assert_far_apart(alone(model, "a", {"x": x}), alone(model, "b", {"x": x}))


@pytest.mark.parametrize("step", KEEPING)
def test_every_way_to_move_rows(step: str) -> None:
    check([step, "plain"], ["b", "a", BASE])


@given(
    steps=st.lists(st.sampled_from(sorted(KEEPING)), min_size=2, max_size=4),
    names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=5),
)
@example(steps=["tiled", "beams", "flat_tokens_first"], names=["a", "b", BASE])
@settings(max_examples=12)
def test_programs_that_keep_rows_are_served_row_by_row(steps: list[str], names: list[str]) -> None:
    check(steps, names)


@pytest.mark.parametrize("step", LOSING)
def test_programs_that_lose_rows_are_refused(step: str) -> None:
    """The layer behind is refused by name; an adapter that has none there is served."""
    model = adapted(["plain", step])
    before = vera_fx.VeraConfig(r=3, target_modules=["layers.0"], plan="factored")
    vera_fx.add_adapter(model, "before", before)
    x = torch.randn(4, TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        refusal = "adapter_names[1] is 'a', whose 'layers.1' cannot differ from row to row"
        for _ in range(2):
            with pytest.raises(vera_fx.TargetError, match=re.escape(refusal)):
                model(x, adapter_names=[BASE, "a", "before", "a"])
        model(x, adapter_names=["before", BASE, "before", "before"])
