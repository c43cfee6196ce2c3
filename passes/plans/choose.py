"""Chooses how each site's branch is computed, by what the plans of its kind cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import tensor_of
from vera_fx.passes.engine.reports import Reason, Why
from vera_fx.passes.plans.plan import PLANS, Assignment, Choice, PlanCosts, Workload
from vera_fx.passes.sites.find import Site, find_sites
from vera_fx.passes.sites.target import Target

_TOLERATED = 0.05
"""How much more than the best an existing graph's plans may cost, as a share of the base's work."""


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites that read one input, and so can share one ``x @ A.T``.

    Attributes:
        sites: name and target of each.
        leading: the input's leading dimensions; sizes left open are SymInts.
        dtype: of the first site's output.
    """

    sites: tuple[tuple[str, Target], ...]
    leading: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype = torch.float32


def site_groups(gm: GraphModule, targets: Sequence[Target]) -> tuple[SiteGroup, ...]:
    """The sites of a captured graph, before any branch is inserted, grouped by their input."""
    by_input: dict[tuple[Node, int], list[Site]] = {}
    for site in find_sites(gm, targets).sites:
        by_input.setdefault((site.x, site.target.in_features), []).append(site)
    return tuple(
        SiteGroup(
            tuple((site.name, site.target) for site in sites),
            tuple(tensor_of(x).shape[:-1]),
            tensor_of(sites[0].node).dtype,
        )
        for (x, _), sites in by_input.items()
    )


def choose_plans(
    groups: Sequence[SiteGroup],
    tokens: Sequence[int],
    work: Workload,
    costs: PlanCosts,
    known: Iterable[Assignment] = (),
) -> Choice:
    """Choose a plan for every site.

    Args:
        groups: the graph's sites, by `site_groups`.
        tokens: for each group, how many rows its input has for the sizes at hand.
        work: ranks and restrictions.
        costs: what the plans cost.
        known: assignments that graphs exist for. One of them is kept if it costs at most 5 % of
            the sites' whole work more than the best, so that few graphs have to be compiled.
    """
    sized = list(zip(groups, tokens, strict=True))
    best = _choice(sized, work, costs, lambda site, target, _: _best(site, target, work))
    for assignment in known:
        other = _choice(sized, work, costs, lambda _s, _t, name, a=assignment: a.plan_of(name))
        other.assignment = replace(other.assignment, folds_again=assignment.folds_again)
        if not work.restricted and _good_enough(other, best, work):
            return other
    return best


def _good_enough(other: Choice, best: Choice, work: Workload) -> bool:
    """True if plans that a graph exists for need not give way to the best."""
    if work.trains and (work.request == "memory" or work.device.spares):
        limit = 1 + _TOLERATED if work.request == "memory" else 2
        if other.kept > limit * best.kept:
            return False
    return other.cost - best.cost <= _TOLERATED * best.base_cost


def _choice(
    sized: Sequence[tuple[SiteGroup, int]],
    work: Workload,
    costs: PlanCosts,
    plan_of: Callable[["_Costs", Target, str], str],
) -> Choice:
    choice = Choice(Assignment())
    plans: dict[str, str] = {}
    again: set[str] = set()
    for group, tokens in sized:
        for name, target in group.sites:
            found = costs(tokens, target, work, len(group.sites))
            kept = costs.kept(tokens, target, work, len(group.sites))
            plan = plans[name] = plan_of(_Costs(found, kept), target, name)
            folds = plan in {"merged", "dense"}
            if folds and costs.folds_again(tokens, target, work, len(group.sites)):
                again.add(name)
            choice.cost += found[plan]
            choice.kept += kept[plan]
            choice.base_cost += found["base"]
            choice.reasons[name] = _why(found, target, tokens, work)
    names = {p: frozenset(n for n, q in plans.items() if q == p) for p in PLANS}
    in_float32 = work.slow_half or (work.narrow and not names["scaled"])
    in_float32 |= _one_row(names, sized, work)
    exact = work.request == "factored" or (in_float32 and work.is_open)
    choice.assignment = Assignment(
        names["merged"], names["dense"], names["scaled"], exact, frozenset(again)
    )
    return choice


def _one_row(
    names: Mapping[str, frozenset[str]], sized: Sequence[tuple[SiteGroup, int]], work: Workload
) -> bool:
    """True where rounding the projections would cost more than one row's products by them.

    One-token decode over half precision: A and B are read once either way, and rounding writes and
    reads them once more. Compiled calls of one row have a program of their own in any case.
    """
    called = all(target.product.layout == "" for group, _ in sized for _, target in group.sites)
    folded = any(names[plan] for plan in ("merged", "dense", "scaled"))
    one = all(tokens == 1 for _, tokens in sized)
    return called and one and not folded and not work.trains and work.itemsize == 2  # noqa: PLR2004


_FOR_MEMORY = 0.125
"""The share of a site's work that half of what it keeps is worth where the base is quantised."""


@dataclass(frozen=True, slots=True)
class _Costs:
    """What a site's plans cost: seconds, and bytes that a training step keeps."""

    time: Mapping[str, float]
    kept: Mapping[str, float]


def _best(site: _Costs, target: Target, work: Workload) -> str:
    if work.restricted:
        return "factored"
    if not work.is_open:
        return work.request
    plans = [plan for plan in allowed(work) if plan in target.product.plans]
    if work.request == "memory" and work.trains:
        return min(plans, key=lambda plan: (site.kept[plan], site.time[plan]))
    fastest = min(plans, key=site.time.__getitem__)
    return _leaner(site, target, plans, fastest, work)


def _leaner(
    site: _Costs, target: Target, plans: Sequence[str], fastest: str, work: Workload
) -> str:
    """The fastest plan, or one that keeps half the memory or less and is hardly slower.

    "Hardly" is what the device `spares`: a share of the site's whole work. Beside a module that graphs
    call it is at least an eighth: a base is quantised to save memory.
    """
    if not work.trains or work.request != "auto":
        return fastest
    spares = max(work.device.spares, 0.0 if target.product.layout else _FOR_MEMORY)
    limit = site.time[fastest] + spares * (site.time["base"] + site.time[fastest])
    lean = [
        plan
        for plan in plans
        if 2 * site.kept[plan] <= site.kept[fastest] and site.time[plan] <= limit
    ]
    return min(lean, key=site.time.__getitem__, default=fastest)


def allowed(work: Workload) -> tuple[str, ...]:
    """The plans that the chooser may take of its own accord, as far as the base's products admit."""
    if work.restricted or len(work.ranks) != 1:
        return ("factored",)
    if work.slow_half:
        return ("factored",)
    return tuple(plan for plan in (("scaled",) if work.narrow else PLANS) if plan in work.plans)


def _why(costs: Mapping[str, float], target: Target, tokens: int, work: Workload) -> Why:
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
    plans = (plan for plan in target.product.plans if plan in work.plans)
    shares = tuple((plan, costs[plan] / costs["factored"]) for plan in plans)
    reasons = {"timed": Reason.TIMED, "memory": Reason.LEANEST}
    return Why(reasons.get(work.request, Reason.CHEAPEST), tokens, shares)
