"""The graph that a program is made from, and what it reads: form by form."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from vera_fx._torch_graphs import copy_of
from vera_fx.bank.adaptation_plan import adaptation_plan
from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.bank.slots import Slot, slot_path
from vera_fx.base.hf import tokenwise
from vera_fx.capturing.export_call import Capture
from vera_fx.capturing.signature import Call
from vera_fx.checkpoint.state_dict import owned_tensors
from vera_fx.errors import AdapterError, ExportError, TargetError
from vera_fx.export.dense import dense_products
from vera_fx.export.files import constant_name
from vera_fx.export.module import Read
from vera_fx.folding.mergeable import folded_weights
from vera_fx.mixing.rows_of_call import row_count, rows_among
from vera_fx.passes import (
    AdaptationPlan,
    Assignment,
    FoldWeights,
    RedirectParameters,
    RowError,
    RowSource,
    RowVectors,
    adaptation,
    resolve,
)
from vera_fx.pipelines import run_pipeline
from vera_fx.products.kinds import stored_weight

_FOLDED = "folded"


def graph_of(
    model: nn.Module, name: str, form: str, capture: Capture, call: Call
) -> tuple[GraphModule, dict[str, Read]]:
    """The graph of one form, over the live model, and what to put in the place of what it reads.

    Args:
        model: an adapted model; ``name`` is the one adapter that is active.
        name: the adapter.
        form: one of `vera_fx.export.checks.manifest.FORMS`.
        capture: the call's capture.
        call: the example call.

    Returns:
        The graph; and by the path under which it reads them, the tensors that the program names anew,
        those that become inputs in the order of the graph's new inputs.

    Raises:
        ExportError: a weight cannot be merged, or rows of the batch cannot be told apart.
    """
    bank = bank_of(model)
    adapter, graph = bank.adapter(name), copy_of(capture.graph)
    plan = _plan(bank, adapter, capture)
    if form == "merged":
        folded = _fold(model, bank, name, graph)
        dense, dense_reads = dense_products(model, graph, folded.called)
        passes = (RedirectParameters(plan.redirects), folded.plain, dense)
        run_pipeline(graph, passes, "export")
        reads = _reads(model, bank, adapter, form) | _folded_reads(model, folded.plain, graph)
        return graph, reads | dense_reads
    reads = _reads(model, bank, adapter, form)
    if form == "rows":
        plan = replace(plan, rows=_row_vectors(model, reads, capture, call))
    try:
        # Factored: the plans that merge within the call are no plain ATen operators.
        dense, dense_reads = dense_products(model, graph, {})
        run_pipeline(graph, (*adaptation(plan, Assignment()), dense), "export")
    except (TargetError, RowError) as error:
        raise ExportError(f"form={form!r} cannot be exported: {error}") from error
    return graph, reads | dense_reads


def _plan(bank: AdapterBank, adapter: Adapter, capture: Capture) -> AdaptationPlan:
    plan = adaptation_plan(bank, lambda path: capture.training.get(path, False))
    # What other adapters have does not concern a program: zeros, and the base's own tensors.
    own_paths = adapter.vectors.by_path
    own_copies = {slot_path(0, attribute) for attribute, *_ in bank.slots.tensors_of(adapter)}
    redirects = tuple(redirect for redirect in plan.redirects if redirect.copy in own_copies)
    branches = tuple(
        branch if target.path in own_paths else ()
        for target, branch in zip(plan.targets, plan.branches, strict=True)
    )
    return replace(plan, branches=branches, redirects=redirects)


def _row_vectors(
    model: nn.Module, reads: Mapping[str, Read], capture: Capture, call: Call
) -> RowVectors:
    """Every vector and copy of the adapter as a further input, with an entry per row."""
    rows = row_count(call)
    if not rows:
        raise ExportError('form="rows" needs an input whose first size is the number of rows')
    inputs = {path: read for path, read in reads.items() if read.is_input}
    sources: list[RowSource] = []
    widths: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for number, (path, read) in enumerate(inputs.items()):
        shape = tuple(read.value.shape)
        sources.append(RowSource(path, f"vector_{number}", 0, shape))
        widths.append((f"vector_{number}", shape, read.value.dtype))
    batched = rows_among(capture.values, call.leaves, rows)
    return RowVectors(tuple(sources), batched, tuple(widths), tokenwise(model))


def _reads(model: nn.Module, bank: AdapterBank, adapter: Adapter, form: str) -> dict[str, Read]:
    """By the path under which graphs read it, each tensor that the program names anew."""
    keys = {id(tensor): key for key, tensor in owned_tensors(adapter)}
    reads: dict[str, Read] = {}
    for attribute, path, tensor_name, tensor in bank.slots.tensors_of(adapter):
        key = keys.get(id(tensor))
        constant = constant_name(f"{path}.{tensor_name}" if key is None else key)
        is_input = form in {"input", "rows"} and key is not None
        read = Read(key if is_input and key else constant, tensor, is_input)
        reads[slot_path(0, attribute)] = read
    for name in adapter.kind.parameters.shared:
        path = slot_path(0, name)
        reads[path] = Read(constant_name(name), resolve(model, path))
    return reads


class _Folded(NamedTuple):
    """Weights with the adapter in them: those that the graph reads, and those of called modules."""

    plain: FoldWeights
    called: dict[str, Tensor]


def _fold(model: nn.Module, bank: AdapterBank, name: str, graph: GraphModule) -> _Folded:
    """Put the folded weights where the pass finds them: on the graph, which is a copy."""
    try:
        weights = folded_weights(model, bank, name)
    except AdapterError as error:
        raise ExportError(f'form="merged" cannot be exported: {error}') from error
    known = bank.structure.targets
    called = {path: weights.pop(path) for path in list(weights) if known[path].is_called}
    targets = [known[path] for path in weights]
    laid = zip(targets, weights.values(), strict=True)
    stored = [w.T.contiguous() if t.product.layout == "in_out" else w for t, w in laid]
    holder = Slot({f"weight_{n}": weight for n, weight in enumerate(stored)})
    graph.__dict__[_FOLDED] = holder
    places = tuple(f"{_FOLDED}.weight_{n}" for n in range(len(weights)))
    return _Folded(FoldWeights(tuple(targets), places), called)


def _folded_reads(model: nn.Module, folded: FoldWeights, graph: GraphModule) -> dict[str, Read]:
    """The folded weights under the targets' names, and what else is tied to them under its own."""
    reads: dict[str, Read] = {}
    taken = {f"{path}.weight" for target in folded.targets for path in target.paths}
    for target, place in zip(folded.targets, folded.weights, strict=True):
        # Whoever reads the base's weight may do so by any of the names that it is tied under.
        free = [path for path in target.weights if path not in taken]
        base = Read((free or [f"{target.path}.base_weight"])[0], stored_weight(model, target.path))
        reads |= {f"{path}.weight": base for path in target.paths}
        reads[place] = Read(f"{target.path}.weight", resolve(graph, place))
    return reads
