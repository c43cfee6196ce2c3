"""An adapter as a state dictionary under PEFT's keys, and adapters made of one."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter, TrainedBias
from vera_fx.bank.blueprint import Blueprint, blueprint
from vera_fx.bank.names import check_known
from vera_fx.base.targets import resolve_targets
from vera_fx.branches.protocol import BranchKind
from vera_fx.checkpoint.weights_file import (
    HASH,
    KEY_PREFIX,
    check_state,
    is_stray,
    plain,
    read_weights,
    shared_keys,
    take_shared,
)
from vera_fx.config import AdapterConfig
from vera_fx.errors import AdapterError, CheckpointError, TargetError
from vera_fx.graphs.runtime import require_adapted


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, detached but not copied.

    ``base_model.model.<target>.<name>`` for the vectors of every target, trained biases and saved
    modules, and with ``save_projection`` also ``base_model.<name>`` for the projections. Names and
    sizes are those of the adapter's kind (`vera_fx.branches`).

    Raises:
        AdapterError: the model is not adapted, or there is no such adapter.
    """
    bank = require_adapted(model)
    check_known(name, bank.adapters)
    adapter = bank.adapter(name)
    state = {key: tensor.detach() for key, tensor in owned_tensors(adapter)}
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


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], name: str = "default"
) -> None:
    """Load tensors under PEFT's keys into an adapter that exists; projections must agree.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or it is merged.
        CheckpointError: a tensor is missing, unknown or of another shape. Nothing is changed then.
    """
    bank = require_adapted(model)
    check_known(name, bank.adapters)
    if name in bank.merged:
        raise AdapterError(
            f"adapter {name!r} is merged into the base, which would not follow; unmerge the model before "
            "loading into it"
        )
    adapter = bank.adapter(name)
    pair = bank.projections_of(adapter)
    state = {plain(key): tensor for key, tensor in state.items()}
    given = take_shared(adapter.kind, state)
    if given is not None and not pair.equals(given):
        raise CheckpointError(
            f"the projections given for adapter {name!r} differ from those it was made with; "
            "load the files under another name with load_adapter"
        )
    expected = dict(owned_tensors(adapter))
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    known = shared_keys(adapter.kind).values()
    check_state(shapes, state, source=f"the state given for adapter {name!r}", shared=known)
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(state[key])


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


def projections_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the values of the projections in float32, in their kind's order."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_adapter(folder: Path, kind: BranchKind) -> tuple[dict[str, Tensor], str | None]:
    """An adapter's own tensors by their keys, and the hash of its projections if the files tell.

    Raises:
        CheckpointError: the files are missing or damaged.
    """
    state, metadata = read_weights(folder)
    shared, keys = take_shared(kind, state), set(shared_keys(kind).values())
    known = None if shared is None else projections_hash(shared)
    own = {k: value for k, value in state.items() if k not in keys and not is_stray(k)}
    return own, metadata.get(HASH) or known
