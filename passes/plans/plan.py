"""Plans: equal functions, different cost; their names, their assignment to sites, what decides them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vera_fx.passes.engine.reports import Reason, Why
from vera_fx.passes.plans.devices import CPU, Device
from vera_fx.passes.sites.target import Target

PLANS = ("factored", "scaled", "merged", "dense")

OPEN = ("auto", "timed", "memory")
"""Requests that leave the choice to the chooser: by modelled time, by measured time, by memory."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The plan of every site; hashable, so that graphs can be kept by it.

    Attributes:
        merged: names of the sites whose plan it is; likewise `dense` and `scaled`. The rest are
            factored.
        exact: keep the order and dtypes of PEFT's operations, also over half-precision bases.
        folds_again: sites whose merged weight is computed again in backward rather than kept.
    """

    merged: frozenset[str] = frozenset()
    dense: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()
    exact: bool = False
    folds_again: frozenset[str] = frozenset()

    def plan_of(self, site: str) -> str:
        """The plan of one site, by name."""
        for name in ("merged", "dense", "scaled"):
            if site in getattr(self, name):
                return name
        return "factored"


@dataclass(frozen=True, slots=True)
class Workload:
    """What the chooser must know beside the graph.

    Attributes:
        ranks: rank of each active adapter.
        trains: gradients of the vectors will be taken.
        slow_half: the base computes in half precision, and the processor multiplies in that more
            slowly than in float32.
        narrow: that precision is float16, in which small gradients vanish: branch products only
            run in it as one scaled product, else in float32.
        itemsize: bytes of one element of the base's weights.
        restricted: why no other plan than factored is possible (dropout, autocast).
        request: ``"auto"``, ``"timed"``, ``"memory"`` or the plan that the user asked for.
        plans: those that the kinds of the active adapters have.
        device: what the device can do.
    """

    ranks: tuple[int, ...]
    trains: bool
    slow_half: bool = False
    narrow: bool = False
    itemsize: int = 4
    restricted: Reason | None = None
    request: str = "auto"
    plans: tuple[str, ...] = PLANS
    device: Device = CPU

    @property
    def is_open(self) -> bool:
        """True if the chooser is to choose."""
        return self.request in OPEN


class PlanCosts(Protocol):
    """What the plans of a kind of branch cost at a site."""

    def __call__(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        """Seconds of each plan beyond the base, and of the base itself under ``"base"``.

        Args:
            T: rows of the site's input.
            target: the site's target.
            work: ranks and restrictions.
            sharing: how many sites read the same input.
        """
        ...

    def kept(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        """Bytes that a training step keeps for the site's sake under each plan."""
        ...

    def folds_again(self, T: int, target: Target, work: Workload, sharing: int) -> bool:
        """True if backward is to fold a merged weight once more rather than keep it."""
        ...


@dataclass(slots=True)
class Choice:
    """The result of `choose_plans`: an assignment, its cost, and a reason for every site.

    Attributes:
        assignment: the plans.
        reasons: why, by site.
        cost: seconds beyond the base.
        base_cost: seconds of the base.
        kept: bytes kept for backward.
    """

    assignment: Assignment
    reasons: dict[str, Why] = field(default_factory=dict[str, Why])
    cost: float = 0.0
    base_cost: float = 0.0
    kept: float = 0.0
