"""Picks the adapted graph for a call: the computing adapters, or the adapters of its rows."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from vera_fx.bank.adaptation_plan import adaptation_plan
from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.capturing.export_call import Capture
from vera_fx.capturing.signature import Call
from vera_fx.errors import AdapterError
from vera_fx.graphs.planning import mixed_assignment, mixed_choice, open_sizes, planner, workload
from vera_fx.graphs.variants import Variant, adapt_graph
from vera_fx.mixing.mixer import Mix, Mixer
from vera_fx.mixing.rows_of_call import rows_among
from vera_fx.passes import Choice, RowError
from vera_fx.pipelines import as_library_errors

if TYPE_CHECKING:
    from collections.abc import Hashable


def adapted(model: nn.Module, capture: Capture, call: Call) -> GraphModule:
    """The graph with the computing adapters, planned for the call's sizes."""
    bank = bank_of(model)
    if not bank.slots.binding.slots:
        return capture.graph
    variants = capture.variants.setdefault(_structure(bank, capture), {})
    choice = _choose(model, capture, call, [*variants])
    variant = variants.get(choice.assignment)
    if variant is None:
        plan = adaptation_plan(bank, lambda path: capture.training.get(path, False))
        variant = variants[choice.assignment] = adapt_graph(plan, capture, choice)
    return variant.for_call()


def mixed(model: nn.Module, capture: Capture, call: Call, mix: Mix) -> Variant:
    """The variant whose rows may each have another adapter."""
    bank = bank_of(model)
    if mix.dropout:
        _refuse_dropout(capture, bank)
    batched = rows_among(capture.values, call.leaves, len(mix.names))
    variants = capture.variants.setdefault((mix.mixer.structure, batched), {})
    assignment = mixed_assignment(model, bank)
    if assignment not in variants:
        with as_library_errors():
            choice = mixed_choice(model, capture.graph, bank)
        variants[assignment] = _mixed_variant(mix.mixer, capture, batched, choice)
    return variants[assignment]


def _mixed_variant(
    mixer: Mixer, capture: Capture, batched: frozenset[int], choice: Choice
) -> Variant:
    """A graph in which all that can differ from row to row does."""
    refused: dict[str, str] = {}
    while True:
        try:
            variant = adapt_graph(mixer.plan(batched, refused), capture, choice)
        except RowError as error:
            refused |= mixer.refused(error.lost)
        else:
            variant.refused = refused
            return variant


def _refuse_dropout(capture: Capture, bank: AdapterBank) -> None:
    training = [path for path in bank.structure.targets if capture.training.get(path)]
    if training:
        raise AdapterError(
            f"adapter_names mixes adapters for inference, without vera_dropout, and the target "
            f"{training[0]!r} is in train mode; call model.eval()"
        )


def _choose(model: nn.Module, capture: Capture, call: Call, known: list[Any]) -> Choice:
    """The plans for the call's sizes; those of a graph that exists if they are good enough."""
    bank = bank_of(model)
    structure = _structure(bank, capture)
    if structure not in capture.planners:
        with as_library_errors():
            capture.planners[structure] = planner(model, capture.graph)
    sizes = open_sizes(capture.values, call.leaves)
    work = workload(model, capture.training, trains=torch.is_grad_enabled())
    return capture.planners[structure].choose(sizes, work, known)


def _structure(bank: AdapterBank, capture: Capture) -> "Hashable":
    """What of the computing adapters shapes the graphs made from a capture."""
    trains = any(capture.training.get(path) for path in bank.structure.targets)
    return bank.slots.binding.structure, bank.slots.binding.dropout if trains else ()
