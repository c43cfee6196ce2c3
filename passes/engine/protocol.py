"""What a pass is and what it reports."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch.fx import GraphModule


class Numerics(enum.Enum):
    """What a pass promises about values; the contract tests enforce it."""

    BITWISE = "every output is bit-for-bit the same; gradients may round differently"
    ROUNDING = "the same function over the reals, in another floating-point order"
    INTENDED = "the function changes on purpose"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One change of the graph: the site or node it is about, and what was done."""

    subject: str
    action: str


@dataclass(frozen=True, slots=True)
class Skip:
    """A candidate the pass left alone, and why. Read by users: names the cause, not the code."""

    subject: str
    reason: str


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did to one graph."""

    rewrites: tuple[Rewrite, ...] = ()
    skips: tuple[Skip, ...] = ()

    @property
    def changed(self) -> bool:
        """True if the graph differs; derived, so that a pass cannot misreport it."""
        return bool(self.rewrites)


class GraphPass(Protocol):
    """One rewrite of a graph, in place. The dataclass fields are its whole configuration."""

    numerics: ClassVar[Numerics]

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Edit ``gm.graph`` and say what was done."""
        ...


class PassContractError(RuntimeError):
    """A pass broke its contract (a fault of the pass, not of the user's model)."""


class SiteError(ValueError):
    """A targeted module is used in the graph in a way that cannot be adapted."""


class RowError(SiteError):
    """What cannot differ from row to row of the batch in a graph.

    Attributes:
        lost: the reasons by the path under which the graph reads it.
    """

    def __init__(self, lost: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{path}: {reason}" for path, reason in lost.items()))
        self.lost = dict(lost)
