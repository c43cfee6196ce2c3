"""An adapter as a state dictionary under PEFT's keys, and adapters made of one."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vera_fx._renamed import renamed
from vera_fx.bank.adapter import Adapter, TrainedBias
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.blueprint import Blueprint, blueprint
from vera_fx.bank.names import check_known
from vera_fx.base.sharding import at_rest, put, whole
from vera_fx.base.targets import resolve_targets
from vera_fx.branches.protocol import BranchKind
from vera_fx.checkpoint.weights_file import (
    HASH,
    KEY_PREFIX,
    check_finite,
    check_shared,
    check_state,
    is_stray,
    plain,
    projections_hash,
    shared_keys,
    take_shared,
    weights_in,
)
from vera_fx.config import AdapterConfig
from vera_fx.disk.safetensors_file import unique
from vera_fx.errors import AdapterError, CheckpointError, TargetError, first_line, shown
from vera_fx.graphs.runtime import require_adapted
from vera_fx.processes.wrapped import unwrapped


@renamed(name="adapter_name")
def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, detached but not copied.

    Those of a sharded model (``fully_shard``) are gathered: every process has to call this.

    ``base_model.model.<target>.<name>`` for the vectors of every target, trained biases and saved
    modules, and with ``save_projection`` also ``base_model.<name>`` for the projections. Names and
    sizes are those of the adapter's kind (`vera_fx.branches`).

    Raises:
        AdapterError: the model is not adapted, or there is no such adapter.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    check_known(adapter_name, bank.adapters)
    adapter = bank.adapter(adapter_name)
    at_rest(model)
    state = {key: whole(tensor.detach()) for key, tensor in owned_tensors(adapter)}
    if adapter.config.saves_shared:
        shared, keys = bank.projections_of(adapter).tensors, shared_keys(adapter.kind)
        state.update((keys[name], tensor) for name, tensor in shared.items())
    return state


def owned_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """``(PEFT's key, tensor)`` of everything an adapter owns, without the projections."""
    for prefix, module in _owners(adapter):
        for name, tensor in module.state_dict(keep_vars=True).items():
            yield f"{prefix}{name}", tensor


def _owners(adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    """``(PEFT's prefix, module)`` of everything an adapter owns."""
    for path, vectors in adapter.vectors.by_path.items():
        yield f"{KEY_PREFIX}{plain(path)}.", vectors
    for path, module in adapter.copies.by_path.items():
        wrapped = isinstance(module, TrainedBias) and path in adapter.vectors.by_path
        yield f"{KEY_PREFIX}{plain(path)}.{'base_layer.' if wrapped else ''}", module


@renamed(name="adapter_name")
def load_adapter_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    adapter_name: str = "default",
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Load tensors under PEFT's keys into an adapter that exists; projections must agree.

    Args:
        model: an adapted model.
        state: the tensors.
        adapter_name: the adapter.
        allow_nonfinite: also load values that are NaN or infinite.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or it is merged.
        CheckpointError: a tensor is missing, unknown, of another shape or kind of dtype, without
            values or not finite. Nothing is changed then.
    """
    bank = _bank_to_load_into(model, adapter_name)
    at_rest(model)
    adapter, source = bank.adapter(adapter_name), f"the state given for adapter {adapter_name!r}"
    pair, expected = bank.projections_of(adapter), dict(owned_tensors(adapter))
    state = _plain_state(state, source)
    given = take_shared(adapter.kind, state, source)
    if given is not None and not pair.equals(given):
        raise CheckpointError(
            f"the projections given for adapter {adapter_name!r} differ from those it was made with; "
            "load the files under another name with load_adapter"
        )
    check_state(expected, state, source=source, others=shared_keys(adapter.kind).values())
    # Whatever can fail does so before the first tensor is written to.
    values = {key: _ready(key, state[key], tensor, source) for key, tensor in expected.items()}
    if not allow_nonfinite:
        check_finite(values, source)
    with torch.no_grad():
        for key, tensor in expected.items():
            put(values[key], tensor)


def _bank_to_load_into(model: nn.Module, adapter_name: str) -> AdapterBank:
    model = unwrapped(model)
    bank = require_adapted(model)
    check_known(adapter_name, bank.adapters)
    if adapter_name in bank.merged:
        raise AdapterError(
            f"adapter {adapter_name!r} is merged into the base, which would not follow; unmerge the "
            "model before loading into it"
        )
    return bank


def _plain_state(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{source} must be a mapping, got a {type(state).__name__}")
    wrong = [k for k, v in state.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if wrong:
        raise CheckpointError(f"{source}: {shown(wrong[0])} is no key with a tensor")
    try:
        return unique((plain(key), tensor) for key, tensor in state.items())
    except ValueError as error:
        raise CheckpointError(
            f"{source}: {error}, as a key of a compiled model and without"
        ) from error


def _ready(key: str, value: Tensor, like: Tensor, source: str) -> Tensor:
    """The value where and as it is needed."""
    try:
        found = value.detach().to(device=like.device, dtype=like.dtype)
    except (RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{source}: {key} cannot be used: {first_line(error)}") from error
    if found.is_meta and not like.is_meta:
        raise CheckpointError(f"{source}: {key} is on the meta device, without values")
    return found


def assign(adapter: Adapter, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Give an adapter without values copies of the tensors of ``state``, which has been checked."""
    for prefix, module in _owners(adapter):
        values = {
            name: state[f"{prefix}{name}"].to(device=device, dtype=empty.dtype, copy=True)
            for name, empty in module.state_dict(keep_vars=True).items()
        }
        module.load_state_dict(values, assign=True)


def plan_of(model: nn.Module, config: AdapterConfig, folder: Path, *, autocast: bool) -> Blueprint:
    """What the adapter in ``folder`` is on this model.

    Raises:
        CheckpointError: its targets do not fit the model.
    """
    try:
        targets = resolve_targets(model, config, strict=False)
        return blueprint(model, config, targets, autocast=autocast)
    except TargetError as error:
        raise CheckpointError(
            f"the adapter in {folder} does not fit this model: {error}"
        ) from error


def read_adapter(folder: Path, kind: BranchKind) -> tuple[dict[str, Tensor], str | None]:
    """An adapter's own tensors by their keys, and the hash of its projections if the files tell.

    Raises:
        CheckpointError: the files are missing or damaged, or hold what is no finite float.
    """
    with weights_in(folder) as weights:
        source, state = str(weights.path), weights.read()
    check_shared(kind, state, weights.metadata, source)
    shared, known = take_shared(kind, state, source), weights.metadata.get(HASH)
    if shared is not None:
        known = projections_hash(shared)
    own = {
        k: v for k, v in state.items() if k not in shared_keys(kind).values() and not is_stray(k)
    }
    check_finite(own, source, remedy="")
    return own, known
