"""The kinds of branch that the library knows: a kind is registered here, by one line."""

from dataclasses import fields
from typing import Any, cast

from vera_fx.branches.dvora.kind import DVORA
from vera_fx.branches.protocol import BranchKind
from vera_fx.branches.vera.kind import VERA
from vera_fx.config import AdapterConfig
from vera_fx.errors import listing
from vera_fx.passes import AdaptationPlan

KINDS: tuple[BranchKind, ...] = (VERA, DVORA)


def kind_of(config: AdapterConfig) -> BranchKind:
    """The kind of the adapters that ``config`` describes."""
    known = {kind.config: kind for kind in KINDS}
    return next(known[base] for base in type(config).__mro__ if base in known)


def is_config(value: object) -> bool:
    """True for the configuration of a known kind."""
    return isinstance(value, tuple(kind.config for kind in KINDS))


def config_from(value: object) -> object:
    """PEFT's configuration of a known kind as ours; anything else as it is.

    Raises:
        ConfigError: a value in it cannot be used.
    """
    theirs = any(base.__module__.partition(".")[0] == "peft" for base in type(value).__mro__)
    peft_type = getattr(value, "peft_type", None)
    kind = kind_called(getattr(peft_type, "value", peft_type))
    if is_config(value) or not theirs or kind is None:
        return value
    names = (field.name for field in fields(cast("Any", kind.config)))
    return kind.config(**{name: getattr(value, name) for name in names if hasattr(value, name)})


def kind_named(name: str) -> BranchKind:
    """The kind that people call ``name``, which must be known."""
    return next(kind for kind in KINDS if kind.name == name)


def kinds_in(plan: AdaptationPlan) -> tuple[str, ...]:
    """The names of the kinds whose branches a plan inserts."""
    graphs = {branch.kind for branches in plan.branches for branch in branches}
    return tuple(kind.name for kind in KINDS if kind.graph in graphs)


def kind_called(peft_type: object) -> BranchKind | None:
    """The kind that configurations on disk call ``peft_type``."""
    return next((kind for kind in KINDS if kind.peft_type == peft_type), None)


def known_types() -> str:
    """The names on disk of all kinds, for messages."""
    return listing(kind.peft_type for kind in KINDS)
