"""An adapted model as a `torch.export` program that runs without vera_fx."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vera_fx._renamed import renamed
from vera_fx._torch import tree_flatten
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.names import one_adapter
from vera_fx.base.modules import base_modules
from vera_fx.base.sharding import has_parallel, has_sharded
from vera_fx.capturing.returned_objects import is_stateful
from vera_fx.capturing.signature import Call
from vera_fx.errors import CaptureError, ExportError, listing, nearest
from vera_fx.export.checks.manifest import FORMS
from vera_fx.export.files import set_manifest
from vera_fx.export.graph import graph_of
from vera_fx.export.module import AUTO, INDEX, VECTORS, ProgramModule, export_module, own
from vera_fx.export.rows import RowProgramModule, row_arguments
from vera_fx.export.vectors import describe_program
from vera_fx.graphs.around import prepare
from vera_fx.graphs.runtime import require_adapted, runtime_of
from vera_fx.mixing.rows_of_call import row_count
from vera_fx.passes import GraphPass
from vera_fx.pipelines import run_pipeline
from vera_fx.processes.wrapped import unwrapped


@renamed(adapter="adapter_name")
def export_program(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    adapter_name: str | None = None,
    form: str = "merged",
    dynamic_shapes: Mapping[str, Any] | str | None = AUTO,
) -> ExportedProgram:
    """Export one adapter over its base as a program of ATen operators that owns its tensors.

    The program is called as the example call is: tensors by position or by name as given here;
    whatever else was passed is fixed. A Hugging Face ``ModelOutput`` comes back as a dict.

    Args:
        model: an adapted model in eval mode.
        args: positional arguments of an example call.
        kwargs: keyword arguments of an example call.
        adapter_name: the adapter to export; None for the active one.
        form: ``"merged"`` folds the adapter into the weights; ``"constant"`` keeps the branch, with
            projections and vectors among the program's tensors (``vera.*``); ``"input"`` takes the
            vectors as the keyword argument ``vectors``, a dict that `program_vectors` makes, so
            that one program serves every adapter with the same projections and targets; ``"rows"``
            takes those of several adapters, stacked, and as ``adapter_index`` for each row of the
            batch the number of its adapter, ``(rows,)``.
        dynamic_shapes: ``"auto"`` leaves every size above 1 open that tracing does not fix; None
            fixes all; or torch.export's ``dynamic_shapes`` by argument name.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        ExportError: adapters are merged, the model is in train mode, the call passes a cache or
            another object with a state, a weight cannot be merged, or torch.export refuses the
            shapes.
        CaptureError: the call cannot be captured.
        The model is unchanged after any of them.
    """
    call = tuple(args), dict(kwargs or {})
    return export_call(model, call, adapter=adapter_name, form=form, dynamic_shapes=dynamic_shapes)


def export_call(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    adapter: str | None,
    form: str,
    dynamic_shapes: Any,
    passes: Sequence[GraphPass] = (),
) -> ExportedProgram:
    """`export_program`, with further passes over the graph that is exported."""
    model = unwrapped(model)
    bank = require_adapted(model)
    if form not in FORMS:
        raise ExportError(
            f"form must be one of {listing(FORMS)}, got {form!r}{nearest(str(form), FORMS)}"
        )
    name = one_adapter(bank.adapters, bank.active, adapter)
    _check_state(model, bank)
    with _alone(bank, name), torch.no_grad():
        prepared = prepare(model, *call)
        if prepared is None:
            reason = runtime_of(model).parts.reasons.get("", "")
            raise CaptureError(f"{type(model).__name__} cannot become a program: {reason}")
        _check_call(prepared.call)
        graph, reads = graph_of(model, name, form, prepared.capture, prepared.call)
        run_pipeline(graph, passes, "export")
        kind = RowProgramModule if form == "rows" else ProgramModule
        program, vectors = own(graph, reads, prepared.capture, kind)
        arguments = {n: v for n, v in prepared.call.arguments.items() if _has_tensor(v)}
        if form == "rows":
            arguments |= row_arguments(vectors, row_count(prepared.call))
        elif form == "input":
            arguments[VECTORS] = vectors
        count = sum(map(_has_tensor, call[0]))
        exported = export_module(program, arguments, count, dynamic_shapes)
    set_manifest(exported, describe_program(model, name, form, exported))
    return exported


def _check_state(model: nn.Module, bank: AdapterBank) -> None:
    if has_sharded(model):
        raise ExportError(
            "this model is sharded (fully_shard), and a program holds whole weights; save the adapter, load "
            "it onto a base in one process, and export that"
        )
    if has_parallel(model):
        raise ExportError(
            "this model is under tensor parallelism, and a program holds whole weights; save the adapter, load "
            "it onto a base in one process, and export that"
        )
    if bank.merged:
        raise ExportError(
            f"adapters {listing(bank.merged)} are merged into the base weights; unmerge the model "
            'before exporting (form="merged" folds the weights of the program alone)'
        )
    training = [
        path or "the model" for path, module in base_modules(model).items() if module.training
    ]
    if training:
        raise ExportError(
            f"{training[0]} is in train mode; programs are exported for inference: call model.eval()"
        )


def _check_call(call: Call) -> None:
    for name, value in call.arguments.items():
        if is_stateful(value) and not isinstance(value, Tensor):
            raise ExportError(
                f"argument {name!r} is a {type(value).__name__}, whose type a reader of the program "
                "would need; pass tensors and plain containers only (use_cache=False)"
            )
        if name.startswith("*") or name in {VECTORS, INDEX}:
            raise ExportError(
                f"argument {name!r} cannot be an input of a program: give every argument a name of its "
                f"own, other than {VECTORS!r} and {INDEX!r}"
            )


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0])


@contextlib.contextmanager
def _alone(bank: AdapterBank, name: str) -> Iterator[None]:
    """Inside the block exactly this adapter computes; who trains is left alone."""
    before = bank.active, bank.disabled
    bank.active, bank.disabled = (name,), 0
    bank.bind()
    try:
        yield
    finally:
        bank.active, bank.disabled = before
        bank.bind()
