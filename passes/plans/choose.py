"""Chooses how each site's branch is computed, by a model of products and memory traffic.

Shape letters: T tokens, I in_features, O out_features, R rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import tensor_of
from vera_fx.passes.engine.reports import Reason, Why
from vera_fx.passes.sites.find import Target, find_sites

PLANS = ("factored", "scaled", "merged", "dense")

_BALANCE = 12.0
"""Floating-point operations that take as long as moving one float32 element to or from memory."""

_LAUNCH = 2e5
"""What one more operator costs in the same unit: about a microsecond."""


_TOLERATED = 0.05
"""How much more than the best an existing graph's plans may cost, as a share of the base's work."""


_FOLDS = 8, 32
"""Tokens per rank from which a second fold costs at most a sixteenth, and a 64th, of the base's own
products: see `folds_again`."""


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
        request: ``"auto"``, ``"timed"`` or the plan that the user asked for.
    """

    ranks: tuple[int, ...]
    trains: bool
    slow_half: bool = False
    narrow: bool = False
    itemsize: int = 4
    restricted: Reason | None = None
    request: str = "auto"

    @property
    def is_open(self) -> bool:
        """True if the chooser is to choose."""
        return self.request in {"auto", "timed"}


Costs = Callable[[int, Target, Workload, int], Mapping[str, float]]
"""What each plan costs beyond the base, and the base itself under ``"base"``, in one unit: for so
many tokens, a target, a workload and the number of sites that read one input."""


@dataclass(slots=True)
class Choice:
    """The result of `choose_plans`: an assignment, its cost, and a reason for every site."""

    assignment: Assignment
    reasons: dict[str, Why] = field(default_factory=dict[str, Why])
    cost: float = 0.0
    base_cost: float = 0.0


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites that read one input, and so can share one ``x @ A.T``.

    Attributes:
        sites: name and target of each.
        leading: the input's leading dimensions; sizes left open are SymInts.
    """

    sites: tuple[tuple[str, Target], ...]
    leading: tuple[int | torch.SymInt, ...]


def site_groups(gm: GraphModule, targets: Sequence[Target]) -> tuple[SiteGroup, ...]:
    """The sites of a captured graph, before any branch is inserted, grouped by their input."""
    by_input: dict[tuple[Node, int], list[tuple[str, Target]]] = {}
    for site in find_sites(gm, targets).sites:
        key = (site.x, site.target.in_features)
        by_input.setdefault(key, []).append((site.name, site.target))
    return tuple(
        SiteGroup(tuple(sites), tuple(tensor_of(x).shape[:-1]))
        for (x, _), sites in by_input.items()
    )


def choose_plans(
    groups: Sequence[SiteGroup],
    tokens: Sequence[int],
    work: Workload,
    known: Iterable[Assignment] = (),
    costs: Costs | None = None,
) -> Choice:
    """Choose a plan for every site.

    Args:
        groups: the graph's sites, by `site_groups`.
        tokens: for each group, how many rows its input has for the sizes at hand.
        work: ranks and restrictions.
        known: assignments that graphs exist for. One of them is kept if it costs at most 5 % of
            the sites' whole work more than the best, so that few graphs have to be compiled.
        costs: measured costs; None for the modelled ones.
    """
    sized = list(zip(groups, tokens, strict=True))
    costs = costs or modelled_costs
    best = _choice(sized, work, costs, lambda found, _: _best(found, work))
    for assignment in known:
        other = _choice(sized, work, costs, lambda _, name, a=assignment: a.plan_of(name))
        other.assignment = replace(other.assignment, folds_again=assignment.folds_again)
        if not work.restricted and other.cost - best.cost <= _TOLERATED * best.base_cost:
            return other
    return best


def _choice(
    sized: Sequence[tuple[SiteGroup, int]],
    work: Workload,
    costs: Costs,
    plan_of: Callable[[Mapping[str, float], str], str],
) -> Choice:
    choice = Choice(Assignment())
    plans: dict[str, str] = {}
    again: set[str] = set()
    for group, tokens in sized:
        for name, target in group.sites:
            found = costs(tokens, target, work, len(group.sites))
            plan = plans[name] = plan_of(found, name)
            if plan in {"merged", "dense"} and folds_again(tokens, target, work, len(group.sites)):
                again.add(name)
            choice.cost += found[plan]
            choice.base_cost += found["base"]
            choice.reasons[name] = _why(found, tokens, work)
    names = {p: frozenset(n for n, q in plans.items() if q == p) for p in PLANS}
    in_float32 = work.slow_half or (work.narrow and not names["scaled"])
    exact = work.request == "factored" or (in_float32 and work.is_open)
    choice.assignment = Assignment(
        names["merged"], names["dense"], names["scaled"], exact, frozenset(again)
    )
    return choice


def _best(costs: Mapping[str, float], work: Workload) -> str:
    if work.restricted:
        return "factored"
    return min(allowed(work), key=costs.__getitem__) if work.is_open else work.request


def allowed(work: Workload) -> tuple[str, ...]:
    """The plans that the chooser may take of its own accord."""
    if work.restricted or len(work.ranks) != 1:
        return ("factored",)
    if work.slow_half:
        return ("factored",)
    return ("scaled",) if work.narrow else PLANS


def _why(costs: Mapping[str, float], tokens: int, work: Workload) -> Why:
    if work.restricted:
        return Why(work.restricted)
    if not work.is_open:
        return Why(Reason.ASKED_FOR)
    if work.slow_half:
        return Why(Reason.SLOW_HALF)
    if len(work.ranks) != 1:
        return Why(Reason.SEVERAL_ACTIVE)
    if work.narrow:
        return Why(Reason.NARROW)
    shares = tuple((plan, costs[plan] / costs["factored"]) for plan in PLANS)
    return Why(Reason.TIMED if work.request == "timed" else Reason.CHEAPEST, tokens, shares)


def folds_again(T: int, target: Target, work: Workload, sharing: int) -> bool:
    """True if backward is to fold the merged weight once more rather than keep its O*I elements.

    That is where a second fold costs next to nothing, or little while the weight is more than a
    quarter of what PEFT keeps for the site: ``x @ A.T`` and the branch's output, in float32.
    """
    cheap, cheaper = _FOLDS
    tokens_per_rank = T / max(work.ranks)
    kept_by_peft = 4 * T * (max(work.ranks) / sharing + target.out_features)
    weight = work.itemsize * target.in_features * target.out_features
    cheap_enough = tokens_per_rank >= (cheap if 4 * weight > kept_by_peft else cheaper)
    return work.trains and cheap_enough


def modelled_costs(T: int, target: Target, work: Workload, sharing: int) -> dict[str, float]:
    """Cost of each plan beyond the base's own products, in floating-point operations.

    ``x @ A.T`` is divided among the ``sharing`` sites that read the input. In training the gradient
    of the input is counted in full: only the first sites of a model do without.
    """
    I, O = target.in_features, target.out_features  # noqa: E741
    costs: dict[str, float] = dict.fromkeys(PLANS, 0.0)
    costs["base"] = (4.0 if work.trains else 2.0) * T * I * O
    folds = 2 if folds_again(T, target, work, sharing) else 1
    for R in work.ranks:
        project, expand, fold = 2.0 * T * I * R / sharing, 2.0 * T * R * O, 2.0 * O * I * R
        rows, passes, scales = T * O * _BALANCE, T * R * _BALANCE, O * R * _BALANCE
        weight = O * I * _BALANCE
        costs["factored"] += project + expand + 2 * passes + 3 * rows + 6 * _LAUNCH
        costs["scaled"] += project + expand + 3 * scales + 2 * rows + 6 * _LAUNCH
        costs["merged"] += (
            folds * fold + project * (not work.trains) + 2 * scales + 2 * weight + 4 * _LAUNCH
        )
        costs["dense"] += folds * fold + 2 * scales + 2 * weight + 4 * _LAUNCH
        if work.trains:
            costs["factored"] += expand + project + 3 * rows + 4 * passes
            costs["scaled"] += 2 * expand + project + 4 * scales
            costs["merged"] += project + expand + 3 * scales
            costs["dense"] += 2.0 * T * I * O + fold + 3 * scales
    return costs
