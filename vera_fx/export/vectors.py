"""An adapter's tensors as programs take them, and what a program says about those it takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vera_fx._renamed import renamed
from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import bank_of
from vera_fx.bank.build import attribute_of
from vera_fx.bank.names import check_known, one_adapter
from vera_fx.checkpoint.state_dict import owned_tensors
from vera_fx.checkpoint.weights_file import projections_hash
from vera_fx.errors import ExportError
from vera_fx.export.files import constant_name, fit_vectors, manifest_of, target_entry
from vera_fx.export.projections import describe, drawn_sizes
from vera_fx.graphs.runtime import require_adapted
from vera_fx.mixing.check import BASE
from vera_fx.processes.wrapped import unwrapped
from vera_fx.products.kinds import place_of


@renamed(name="adapter_names")
def program_vectors(
    model: nn.Module, adapter_names: str | Sequence[str] | None = None, program: Any = None
) -> dict[str, Tensor]:
    """An adapter's tensors as a program takes them, detached but not copied.

    For form ``"input"`` the keys are those of a PEFT checkpoint without its projections: the
    tensors of an ``adapter_model.safetensors`` can be given to the program as they are read. For
    form ``"constant"`` they are names in the program's ``state_dict``, for ``load_constants``. For
    form ``"rows"`` the tensors of several adapters are stacked under the checkpoint's keys.

    Args:
        model: an adapted model.
        adapter_names: the adapter, None for the active one; or a list of adapters to stack, in which
            ``"__base__"`` stands for the plain base.
        program: the program to make them for and to check them against: from `export_program`,
            `load_program`, or an AOTInductor package; None for one of form ``"input"``, or of form
            ``"rows"`` if ``adapter_names`` is a list, unchecked.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        ExportError: an adapter's targets, rank or projections are not those of ``program``; or a list
            was given for a program of another form than ``"rows"``.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    manifest = None if program is None else manifest_of(program)
    if adapter_names is None or isinstance(adapter_names, str):
        name = one_adapter(bank.adapters, bank.active, adapter_names)
        if manifest is None or manifest.get("form") != "rows":
            return _fitting(model, name, manifest)
        adapter_names = [name]
    return _stacked(model, list(adapter_names), manifest)


def _fitting(model: nn.Module, name: str, manifest: dict[str, Any] | None) -> dict[str, Tensor]:
    adapter = bank_of(model).adapter(name)
    vectors = {key: tensor.detach() for key, tensor in owned_tensors(adapter)}
    if manifest is None:
        return vectors
    return fit_vectors(manifest, projections_of(model, adapter), vectors, name)


def _stacked(
    model: nn.Module, names: list[str], manifest: dict[str, Any] | None
) -> dict[str, Tensor]:
    """``(len(names), *shape)`` under every key; entry ``i`` is that of the adapter ``names[i]``."""
    bank = bank_of(model)
    if manifest is not None and manifest.get("form") != "rows":
        raise ExportError(
            f"a list of adapters was given for a program of form {manifest.get('form', 'unknown')!r}: "
            'only form="rows" takes several; give one name'
        )
    adapters = [name for name in names if name != BASE]
    for name in adapters:
        check_known(name, bank.adapters)
    if not adapters:
        raise ExportError(f"no adapter was given to stack, only {names}")
    found = {name: _fitting(model, name, manifest) for name in dict.fromkeys(adapters)}
    if manifest is None:
        _check_alike(found)
    if BASE in names:
        found[BASE] = _of_the_base(model, bank.adapter(adapters[0]))
    return {key: torch.stack([found[name][key] for name in names]) for key in found[adapters[0]]}


def _check_alike(found: dict[str, dict[str, Tensor]]) -> None:
    first, *others = found
    shapes = {key: value.shape for key, value in found[first].items()}
    for name in others:
        if {key: value.shape for key, value in found[name].items()} != shapes:
            raise ExportError(
                f"adapters {first!r} and {name!r} cannot be stacked: they have other targets, another "
                "rank or other trained copies"
            )


def _of_the_base(model: nn.Module, like: Adapter) -> dict[str, Tensor]:
    """What stands for no adapter: vectors that add nothing, and the base's own tensors."""
    keys = {id(tensor): key for key, tensor in owned_tensors(like)}
    values: dict[str, Tensor] = {}
    vectors = like.kind.parameters.own
    for _, path, name, tensor in bank_of(model).slots.tensors_of(like):
        if id(tensor) in keys:
            is_vector = name in vectors
            base = tensor if is_vector else attribute_of(model.get_submodule(path), name)
            values[keys[id(tensor)]] = torch.zeros_like(base) if is_vector else base.detach()
    return values


def describe_program(
    model: nn.Module, name: str, form: str, program: ExportedProgram
) -> dict[str, Any]:
    """What a program was made from, as far as a reader may want to check or change it."""
    bank = bank_of(model)
    adapter = bank.adapter(name)
    vectors: dict[str, Any] = {}
    for key, tensor in owned_tensors(adapter):
        constant = constant_name(key)
        known = constant if constant in program.state_dict else None
        known = key if form in {"input", "rows"} else known
        vectors[key] = {"shape": list(tensor.shape), "name": known}
    return {
        "form": form,
        "adapter": name,
        "kind": adapter.kind.name,
        "targets": [target_entry(bank.structure.targets[p]) for p in adapter.vectors.by_path],
        "vectors": vectors,
        "projections": describe(program, projections_of(model, adapter), adapter.kind),
    }


def projections_of(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """What an adapter's projections are, as manifests say it."""
    pair = bank_of(model).projections_of(adapter)
    dtypes = [place_of(model, path)[0] for path in adapter.vectors.by_path]
    return {
        "sha256": projections_hash(pair.tensors),
        "seed": adapter.kind.parameters.seed(adapter.config),
        "r": pair.r,
        **drawn_sizes(adapter.kind, pair.tensors),
        # What `build.draw` casts them to, which rounds on half-precision bases.
        "through": [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes)],
    }
