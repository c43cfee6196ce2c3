"""An adapted model as a `torch.export` program that runs without vera_fx."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from vera_fx._torch import tree_flatten
from vera_fx.adapter import Adapter
from vera_fx.bank import AdapterBank, bank_of
from vera_fx.capture import Capture
from vera_fx.checkpoint import KEY_PREFIX, owned_tensors, projections_hash
from vera_fx.errors import AdapterError, CaptureError, ExportError, listing, nearest
from vera_fx.merging import merged_weights
from vera_fx.names import one_adapter
from vera_fx.passes import (
    Assignment,
    GraphPass,
    RedirectParameters,
    adaptation,
    resolve,
    run_passes,
)
from vera_fx.program_files import fit_vectors, manifest_of, set_manifest
from vera_fx.program_module import AUTO, VECTORS, Read, export_module, own
from vera_fx.program_projections import describe
from vera_fx.returned import is_stateful
from vera_fx.runtime import prepare, require_adapted, runtime_of
from vera_fx.signature import Call
from vera_fx.slots import slot_path
from vera_fx.targets import base_modules, weight_of
from vera_fx.variants import copy_of

FORMS = ("merged", "constant", "input")


def export_program(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    adapter: str | None = None,
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
        adapter: the adapter to export; None for the active one.
        form: ``"merged"`` folds the adapter into the weights; ``"constant"`` keeps the branch, with
            projections and vectors among the program's tensors (``vera.*``); ``"input"`` takes the
            vectors as the keyword argument ``vectors``, a dict that `program_vectors` makes, so
            that one program serves every adapter with the same projections and targets.
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
    return export_call(model, call, adapter=adapter, form=form, dynamic_shapes=dynamic_shapes)


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
        graph = _graph(bank, bank.adapter(name), prepared.capture, form)
        run_passes(graph, passes)
        program, vectors = own(graph, _reads(model, bank, name, form), prepared.capture)
        arguments = {n: v for n, v in prepared.call.arguments.items() if _has_tensor(v)}
        if form == "input":
            arguments[VECTORS] = vectors
        count = sum(map(_has_tensor, call[0]))
        exported = export_module(program, arguments, count, dynamic_shapes)
    set_manifest(exported, _manifest(model, name, form, exported))
    return exported


def program_vectors(
    model: nn.Module, name: str | None = None, program: Any = None
) -> dict[str, Tensor]:
    """An adapter's tensors as a program takes them, detached but not copied.

    For form ``"input"`` the keys are those of a PEFT checkpoint without its projections: the
    tensors of an ``adapter_model.safetensors`` can be given to the program as they are read. For
    form ``"constant"`` they are names in the program's ``state_dict``, for ``load_constants``.

    Args:
        model: an adapted model.
        name: the adapter; None for the active one.
        program: the program to make them for and to check them against: from `export_program`,
            `load_program`, or an AOTInductor package; None for one of form ``"input"``, unchecked.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        ExportError: the adapter's targets, rank or projections are not those of ``program``.
    """
    bank = require_adapted(model)
    name = one_adapter(bank.adapters, bank.active, name)
    adapter = bank.adapter(name)
    vectors = {key: tensor.detach() for key, tensor in owned_tensors(adapter)}
    if program is None:
        return vectors
    return fit_vectors(manifest_of(program), _projections(model, adapter), vectors, name)


def _manifest(model: nn.Module, name: str, form: str, program: ExportedProgram) -> dict[str, Any]:
    """What a program was made from, as far as a reader may want to check or change it."""
    bank = bank_of(model)
    adapter = bank.adapter(name)
    vectors: dict[str, Any] = {}
    for key, tensor in owned_tensors(adapter):
        constant = _constant_name(key)
        known = key if form == "input" else constant if constant in program.state_dict else None
        vectors[key] = {"shape": list(tensor.shape), "name": known}
    return {
        "form": form,
        "adapter": name,
        "targets": [asdict(bank.targets[path]) for path in adapter.vectors.by_path],
        "vectors": vectors,
        "projections": describe(program, _projections(model, adapter)),
    }


def _constant_name(key: str) -> str:
    """What a program calls a tensor of the adapter that a checkpoint has under ``key``."""
    return f"vera.{key.removeprefix(KEY_PREFIX)}"


def _projections(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    pair = bank_of(model).projections_of(adapter)
    dtypes = [weight_of(model, path).dtype for path in adapter.vectors.by_path]
    return {
        "sha256": projections_hash(pair),
        "seed": adapter.config.projection_prng_key,
        "r": pair.r,
        "max_in": pair.vera_A.shape[1],
        "max_out": pair.vera_B.shape[0],
        # What `build.draw` casts them to, which rounds on half-precision bases.
        "through": [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes)],
    }


def _check_state(model: nn.Module, bank: AdapterBank) -> None:
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
        if name.startswith("*") or name == VECTORS:
            raise ExportError(
                f"argument {name!r} cannot be an input of a program: "
                "give every argument a name of its own, other than 'vectors'"
            )


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0])


@contextlib.contextmanager
def _alone(bank: AdapterBank, name: str) -> Iterator[None]:
    """Inside the block exactly this adapter computes; who trains is left alone."""
    before = bank.active, bank.enabled
    bank.active, bank.enabled = (name,), True
    bank.bind()
    try:
        yield
    finally:
        bank.active, bank.enabled = before
        bank.bind()


def _graph(bank: AdapterBank, adapter: Adapter, capture: Capture, form: str) -> GraphModule:
    """The captured graph, with the branch unless it is to be merged."""
    plan = bank.plan(lambda path: capture.training.get(path, False))
    # What other adapters have does not concern a program: zeros, and the base's own tensors.
    own_paths = adapter.vectors.by_path
    own_copies = {slot_path(0, attribute) for attribute, *_ in bank.slot_tensors(adapter)}
    redirects = tuple(redirect for redirect in plan.redirects if redirect.copy in own_copies)
    branches = tuple(
        branch if target.path in own_paths else ()
        for target, branch in zip(plan.targets, plan.branches, strict=True)
    )
    graph = copy_of(capture.graph)
    passes = (
        (RedirectParameters(redirects),)
        if form == "merged"
        # Factored: the plans that merge within the call are no plain ATen operators.
        else adaptation(replace(plan, branches=branches, redirects=redirects), Assignment())
    )
    run_passes(graph, passes)
    return graph


def _reads(model: nn.Module, bank: AdapterBank, name: str, form: str) -> dict[str, Read]:
    """By the path under which graphs read it, each tensor that the program names anew."""
    adapter = bank.adapter(name)
    keys = {id(tensor): key for key, tensor in owned_tensors(adapter)}
    reads: dict[str, Read] = {}
    for attribute, path, tensor_name, tensor in bank.slot_tensors(adapter):
        key = keys.get(id(tensor))
        constant = _constant_name(f"{path}.{tensor_name}" if key is None else key)
        is_input = form == "input" and key is not None
        read = Read(key if is_input and key else constant, tensor, is_input)
        reads[slot_path(0, attribute)] = read
    for projection in ("vera_A", "vera_B"):
        path = slot_path(0, projection)
        reads[path] = Read(f"vera.{projection}", resolve(model, path))
    if form == "merged":
        reads |= {path: Read(path, value) for path, value in _merged(model, bank, name).items()}
    return reads


def _merged(model: nn.Module, bank: AdapterBank, name: str) -> dict[str, Tensor]:
    try:
        return merged_weights(model, bank, name)
    except AdapterError as error:
        raise ExportError(f'form="merged" cannot be exported: {error}') from error
