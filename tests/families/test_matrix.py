"""The matrix: every family by every column. One column runs in the fast suite."""

from collections.abc import Callable

import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING

import vera_fx
from tests.families.checks import CHECKS, compare_outputs
from tests.families.decoders import DECODERS
from tests.families.encoders import ENCODERS
from tests.families.member import COLUMNS, Member
from tests.families.modules import MODULES
from tests.families.seq2seq import SEQ2SEQ
from tests.families.vision import VISION
from tests.models import BY_NAME
from vera_fx.base.default_targets import DEFAULT_TARGETS
from vera_fx.base.targets import resolve_targets
from vera_fx.products.kinds import known_kind

MEMBERS = (*DECODERS, *ENCODERS, *SEQ2SEQ, *VISION, *MODULES)
NEW = [
    member
    for member in MEMBERS
    if member.name not in BY_NAME and not member.limits and not member.parts
]
Record = Callable[[str, object], None]


def members(which: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("member", which, ids=lambda member: member.name)


@pytest.fixture
def _can_be_built(member: Member) -> None:
    try:
        member.build()
    except ImportError as error:
        pytest.skip(f"not run: {error}")


@pytest.mark.usefixtures("_can_be_built")
@members(NEW)
def test_outputs_in_eval_mode(member: Member) -> None:
    compare_outputs(member, train=False)


@members([member for member in MEMBERS if member.name != "timm-vit" and member not in MODULES])
def test_default_targets(member: Member) -> None:
    """The query and value projections of every attention, PEFT's where PEFT has a default."""
    model = member.build()
    kind = model.config.model_type
    targets = resolve_targets(model, vera_fx.VeraConfig(r=2))
    theirs = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING.get(kind)
    if theirs is not None:
        assert set(DEFAULT_TARGETS[kind]) == set(theirs)
    ends = ("attn", "attention", "Attention")
    layers = [p for p, m in model.named_modules() if p.endswith(ends) and known_kind(m) is None]
    assert len(targets) in {len(layers), 2 * len(layers)}


@pytest.mark.slow
@members(MEMBERS)
@pytest.mark.parametrize("column", COLUMNS)
def test_cell(member: Member, column: str, record_property: Record) -> None:
    record_property("cell", [member.name, column, cell(member, column)])


def cell(member: Member, column: str) -> str:
    """Run one check; the text for the table."""
    try:
        member.build()
    except ImportError as error:
        return f"not run: {error}"
    if column == "generate" and not member.generates:
        return "n/a"
    reason = member.limits.get(column)
    if member.parts and column in {"capture", "train", "compile"}:
        with pytest.warns(vera_fx.PartialCaptureWarning, match=member.parts) as warned:
            CHECKS[column](member)
        (said,) = {str(w.message) for w in warned if w.category is vera_fx.PartialCaptureWarning}
        return f"in parts: {said.splitlines()[0]}"
    if reason is None:
        CHECKS[column](member)
        return "yes"
    with pytest.raises(vera_fx.VeraFxError, match=reason) as caught:
        CHECKS[column](member)
    return str(caught.value).splitlines()[0]
