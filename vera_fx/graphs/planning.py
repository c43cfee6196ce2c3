"""Chooses plans for one captured graph and the sizes at hand, and remembers what it chose."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.base.sharding import has_sharded
from vera_fx.graphs.machine import autocast_state, costs_of, multiplies_well
from vera_fx.graphs.timing import TimedCosts
from vera_fx.passes import (
    PLANS,
    Assignment,
    Choice,
    LayerTime,
    PlanCosts,
    Reason,
    SiteGroup,
    Why,
    Workload,
    choose_plans,
    concrete,
    site_groups,
)
from vera_fx.products.kinds import place_of

_HALF = (torch.float16, torch.bfloat16)


_OURS = ("auto", "memory", "timed")
"""Requests that leave the choice to the chooser."""

_FOLDING = ("merged", "dense")
"""Plans that keep a weight of full size for the backward: what a sharded model is to do without."""

_KEPT = 512
"""Choices that a planner keeps: one for each number of tokens and workload."""


@dataclass(slots=True)
class Planner:
    """Plans for one captured graph under one structure of the bank.

    Attributes:
        groups: the graph's sites by the input they read.
        modelled: what the plans cost by a model.
        timed: what they cost by timing, for those who ask for it.
        dtype: that the base computes in.
        chosen: the choice for each workload and number of tokens.
    """

    groups: tuple[SiteGroup, ...]
    modelled: PlanCosts
    timed: PlanCosts
    dtype: torch.dtype
    chosen: dict[Any, Choice] = field(default_factory=dict[Any, Choice])

    def choose(
        self, sizes: Mapping[Any, int], work: Workload, known: Sequence[Assignment]
    ) -> Choice:
        """The plans for these sizes; the same tokens always get the same plans."""
        tokens = tuple(_count(group.leading, sizes) for group in self.groups)
        key = (tokens, work)
        if key not in self.chosen:
            if len(self.chosen) >= _KEPT:
                del self.chosen[next(iter(self.chosen))]
            costs = self.timed if work.request == "timed" else self.modelled
            self.chosen[key] = choose_plans(self.groups, tokens, work, costs, known)
        return self.chosen[key]


def planner(model: nn.Module, graph: torch.fx.GraphModule) -> Planner:
    """A planner for a captured graph of the model."""
    bank = bank_of(model)
    kinds = {bank.adapter(name).kind for name in bank.slots.binding.names}
    kind = next(iter(kinds))
    dtype, device = _place(model)
    groups = site_groups(graph, list(bank.structure.targets.values()))
    called = [group.dtype for group in groups if group.sites[0][1].is_called]
    # A weight that only its module reads does not say what is computed in; the outputs do.
    return Planner(groups, kind.costs, TimedCosts(kind, dtype, device), (*called, dtype)[0])


def layer_time(model: nn.Module, sizes: Mapping[Any, int]) -> LayerTime:
    """What estimates the work of the model's layers, where its targets are."""
    return LayerTime(costs_of(_place(model)[1]), sizes)


def _place(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the first target."""
    return place_of(model, next(iter(bank_of(model).structure.targets)))


def open_sizes(values: Sequence[Tensor], leaves: Sequence[Tensor]) -> dict[Any, int]:
    """The value of every open size, read off the inputs.

    Args:
        values: fake inputs of a graph, whose sizes may be symbols.
        leaves: real inputs.
    """
    sizes: dict[Any, int] = {}
    for value, leaf in zip(values, leaves, strict=True):
        for size, real in zip(value.shape, leaf.shape, strict=True):
            if isinstance(size, torch.SymInt):
                sizes[size.node.expr] = real
    return sizes


def _count(leading: Sequence[int | torch.SymInt], sizes: Mapping[Any, int]) -> int:
    """Rows of an input; sizes that depend on tensor values count as in the example."""
    return math.prod(concrete(dim, sizes) for dim in leading)


def workload(
    model: nn.Module, training: Mapping[str, bool], dtype: torch.dtype, *, trains: bool
) -> Workload:
    """What the chooser must know of the computing adapters and of the call.

    Args:
        model: the adapted model.
        training: for each module path, whether it is in train mode.
        dtype: that the base computes in.
        trains: gradients will be taken.
    """
    bank = bank_of(model)
    adapters = [bank.adapter(name) for name in bank.slots.binding.names]
    known, (_, device) = bank.slots.work, _place(model)
    requests = set(known.requests)
    in_train_mode = any(training.get(path) for path in bank.structure.targets)
    request = requests.pop() if len(requests) == 1 else "auto"
    trains = trains and known.trains
    plans = _common_plans(adapters)
    if trains and request in _OURS and has_sharded(model):
        plans = tuple(plan for plan in plans if plan not in _FOLDING)
    return Workload(
        ranks=known.ranks,
        trains=trains,
        slow_half=dtype in _HALF and not multiplies_well(dtype, device),
        narrow=dtype == torch.float16,
        itemsize=dtype.itemsize,
        restricted=_restriction(adapters, in_train_mode),
        request=request,
        plans=plans,
        device=costs_of(device),
    )


def _common_plans(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    return tuple(p for p in PLANS if all(p in a.kind.graph.plans for a in adapters))


def mixed_assignment(model: nn.Module, bank: AdapterBank) -> Assignment:
    """The plans of a batch that mixes adapters: factored, since no weight can serve all rows."""
    places = {place_of(model, path) for path in bank.structure.targets}
    slow = any(dtype in _HALF and not multiplies_well(dtype, device) for dtype, device in places)
    return Assignment(exact=slow or bank.structure.exact)


def mixed_choice(model: nn.Module, graph: torch.fx.GraphModule, bank: AdapterBank) -> Choice:
    """`mixed_assignment` with the reason for every site of a captured graph."""
    groups = site_groups(graph, list(bank.structure.targets.values()))
    sites = [name for group in groups for name, _ in group.sites]
    return Choice(mixed_assignment(model, bank), dict.fromkeys(sites, Why(Reason.PER_ROW)))


def _restriction(adapters: Sequence[Adapter], train_mode: bool) -> Reason | None:
    if train_mode and any(adapter.config.dropout for adapter in adapters):
        return Reason.DROPOUT
    return Reason.AUTOCAST if autocast_state() else None
