"""Picks the adapted graph for a call: the computing adapters, or the adapters of its rows."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from vera_fx._torch import is_transformed
from vera_fx.bank.adaptation_plan import adaptation_plan
from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.capturing.export_call import Capture
from vera_fx.capturing.signature import Call
from vera_fx.errors import AdapterError, CaptureError, TargetError
from vera_fx.graphs.planning import (
    layer_time,
    mixed_assignment,
    mixed_choice,
    open_sizes,
    planner,
    workload,
)
from vera_fx.graphs.variants import Variant, adapt_graph
from vera_fx.mixing.mixer import Mix, Mixer
from vera_fx.mixing.rows_of_call import rows_among
from vera_fx.passes import Choice, RowError
from vera_fx.pipelines import as_library_errors

if TYPE_CHECKING:
    from collections.abc import Hashable


_STRUCTURES = 64
"""Structures of a bank for which the graphs of one capture are kept."""


def adapted(model: nn.Module, capture: Capture, call: Call) -> GraphModule:
    """The graph with the computing adapters, planned for the call's sizes."""
    bank = bank_of(model)
    if not bank.slots.binding.slots:
        return capture.graph
    variants = _variants(capture, _structure(bank, capture))
    choice = _choose(model, capture, call, [*variants])
    variant = variants.get(choice.assignment)
    if variant is None:
        _check_aliased(bank, capture)
        plan = adaptation_plan(bank, lambda path: capture.training.get(path, False))
        variant = variants[choice.assignment] = adapt_graph(plan, capture, choice)
    sizes = open_sizes(capture.values, call.leaves)
    return variant.for_call(layer_time(model, sizes))


def _check_aliased(bank: AdapterBank, capture: Capture) -> None:
    weights = {weight: t.path for t in bank.structure.targets.values() for weight in t.weights}
    for path in capture.aliased:
        if path in weights:
            raise TargetError(
                f"the weight of target {weights[path]!r} is read by code that holds on to it past its "
                "module (in a list, a closure or a compiled function), where no branch can be added; "
                f"exclude {weights[path]!r} from target_modules, or let the code call the module"
            )


def _variants(capture: Capture, structure: "Hashable") -> dict[Any, Variant]:
    """The variants for one structure of the bank; those of an older one go if there are too many."""
    found = capture.variants.pop(structure, {})
    capture.variants[structure] = found
    while len(capture.variants) > _STRUCTURES:
        oldest = next(iter(capture.variants))
        del capture.variants[oldest]
        capture.planners.pop(oldest, None)
    return found


def mixed(model: nn.Module, capture: Capture, call: Call, mix: Mix) -> tuple[Variant, GraphModule]:
    """The variant whose rows may each have another adapter, and its graph for this call."""
    bank = bank_of(model)
    dropout = _mixed_dropout(capture, bank, mix)
    batched = rows_among(capture.values, call.leaves, len(mix.names))
    variants = _variants(capture, (mix.mixer.structure, batched, dropout))
    assignment = mixed_assignment(model, bank)
    if assignment not in variants:
        with as_library_errors():
            choice = mixed_choice(model, capture.graph, bank)
        variants[assignment] = _mixed_variant(mix.mixer, capture, batched, dropout, choice)
    variant = variants[assignment]
    if not torch.is_grad_enabled():
        return variant, variant.graph
    sizes = open_sizes(capture.values, call.leaves)
    return variant, variant.for_call(layer_time(model, sizes))


def _mixed_variant(
    mixer: Mixer,
    capture: Capture,
    batched: frozenset[int],
    dropout: tuple[float, ...],
    choice: Choice,
) -> Variant:
    """A graph in which all that can differ from row to row does."""
    refused: dict[str, str] = {}

    def shares(path: str) -> list[float]:
        return [share * capture.training.get(path, False) for share in dropout]

    while True:
        try:
            variant = adapt_graph(mixer.plan(batched, refused, shares), capture, choice)
        except RowError as error:
            refused |= mixer.refused(error.lost)
        else:
            variant.refused = refused
            return variant


def _mixed_dropout(capture: Capture, bank: AdapterBank, mix: Mix) -> tuple[float, ...]:
    """What each group's branches drop where targets are in train mode; zeros where none is.

    Raises:
        AdapterError: adapters of one group, which share its products, differ in it.
    """
    training = [path for path in bank.structure.targets if capture.training.get(path)]
    known = mix.dropout if training else (0.0,) * len(mix.mixer.groups)
    found = tuple(share for share in known if share is not None)
    if len(found) < len(known):
        rates = {name: adapter.config.dropout for name, adapter in mix.adapters.items()}
        raise AdapterError(
            f"adapter_names mixes adapters of different dropout ({rates}), and the target "
            f"{training[0]!r} is in train mode; adapters that share projections drop elements of one "
            "input together: give them one rate, or call model.eval()"
        )
    return found


def _choose(model: nn.Module, capture: Capture, call: Call, known: list[Any]) -> Choice:
    """The plans for the call's sizes; those of a graph that exists if they are good enough."""
    bank = bank_of(model)
    structure = _structure(bank, capture)
    if structure not in capture.planners:
        with as_library_errors():
            capture.planners[structure] = planner(model, capture.graph)
    sizes = open_sizes(capture.values, call.leaves)
    found = capture.planners[structure]
    work = workload(model, capture.training, found.dtype, trains=torch.is_grad_enabled())
    return found.choose(sizes, work, known)


def _structure(bank: AdapterBank, capture: Capture) -> "Hashable":
    """What of the computing adapters shapes the graphs made from a capture."""
    trains = any(capture.training.get(path) for path in bank.structure.targets)
    return bank.slots.binding.structure, bank.slots.binding.dropout if trains else ()


def refuse_transforms(model: nn.Module, capture: Capture) -> None:
    """Refuse a graph that calls targets inside of a transform: what a branch's values are is not noted there.

    Raises:
        CaptureError: with the first such target.
    """
    targets = bank_of(model).structure.targets
    for node in capture.graph.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not is_transformed(value):
            continue
        read = {
            str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"
        }
        if inside := sorted(read.intersection(targets)):
            raise CaptureError(
                f"torch.func transforms (vmap or the like) the call of {inside[0]!r}"
            )
