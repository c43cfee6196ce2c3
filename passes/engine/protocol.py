"""What a pass is and what it reports."""

import enum
from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch.fx import GraphModule

from vera_fx.passes.engine.reports import PassReport


class Numerics(enum.Enum):
    """What a pass promises about values; the contract tests enforce it."""

    BITWISE = "every output is bit-for-bit the same; gradients may round differently"
    ROUNDING = "the same function over the reals, in another floating-point order"
    INTENDED = "the function changes on purpose"


class GraphPass(Protocol):
    """One rewrite of a graph, in place. The dataclass fields are its whole configuration."""

    numerics: ClassVar[Numerics]

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Edit ``gm.graph`` and say what was done."""
        ...


class PassContractError(RuntimeError):
    """A pass broke its contract (a fault of the pass, not of the user's model).

    Attributes:
        pass_name: the pass.
        site: the site that it was at, if that is known.
    """

    def __init__(self, message: str, pass_name: str, site: str = "") -> None:
        super().__init__(message)
        self.pass_name, self.site = pass_name, site


class EmitError(RuntimeError):
    """An operator that a pass wanted to insert cannot be run on what the graph holds.

    Attributes:
        site: the site that it was for.
    """

    def __init__(self, message: str, site: str) -> None:
        super().__init__(message)
        self.site = site


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
