"""Adapters on disk, in PEFT's layout and under PEFT's keys; interchangeable both ways."""

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vera_fx.adapt import adapt_with, check_adaptable
from vera_fx.adapted import is_adapted
from vera_fx.adapter import Adapter, TrainedBias
from vera_fx.adapter_files import (
    HASH,
    KEY_PREFIX,
    PROJECTIONS,
    WEIGHTS_FILE,
    check_state,
    is_stray,
    read_weights,
)
from vera_fx.bank import AdapterBank, bank_of
from vera_fx.build import Blueprint, blueprint, build_adapter, draw, install
from vera_fx.config import VeraConfig
from vera_fx.errors import CheckpointError, TargetError
from vera_fx.files import moved_into
from vera_fx.names import check_known, check_name
from vera_fx.peft_config import CONFIG_FILE, read_json, to_json
from vera_fx.projections import Projections
from vera_fx.runtime import require_adapted
from vera_fx.targets import resolve_targets

M = TypeVar("M", bound=nn.Module)


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys, detached but not copied.

    ``base_model.model.<target>.vera_lambda_d`` ``(r,)`` and ``.vera_lambda_b`` ``(out,)``, trained
    biases and saved modules, and with ``save_projection`` also ``base_model.vera_A`` ``(r, max_in)``
    and ``base_model.vera_B`` ``(max_out, r)``.

    Raises:
        AdapterError: the model is not adapted, or there is no such adapter.
    """
    bank = require_adapted(model)
    check_known(name, bank.adapters)
    adapter = bank.adapter(name)
    state = {key: tensor.detach() for key, tensor in owned_tensors(adapter)}
    if adapter.config.save_projection:
        pair = bank.projections_of(adapter)
        state.update(zip(PROJECTIONS, (pair.vera_A, pair.vera_B), strict=True))
    return state


def owned_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """``(PEFT's key, tensor)`` of everything an adapter owns, without the projections."""
    for path, vectors in adapter.vectors.by_path.items():
        for name, tensor in vectors.named_parameters():
            yield f"{KEY_PREFIX}{path}.{name}", tensor
    for path, module in adapter.copies.by_path.items():
        wrapped = isinstance(module, TrainedBias) and path in adapter.vectors.by_path
        middle = "base_layer." if wrapped else ""
        for name, tensor in module.state_dict(keep_vars=True).items():
            yield f"{KEY_PREFIX}{path}.{middle}{name}", tensor


def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], name: str = "default"
) -> None:
    """Load tensors under PEFT's keys into an adapter that exists; projections must agree.

    Raises:
        AdapterError: the model is not adapted, or there is no such adapter.
        CheckpointError: a tensor is missing, unknown or of another shape. Nothing is changed then.
    """
    bank = require_adapted(model)
    check_known(name, bank.adapters)
    adapter = bank.adapter(name)
    pair = bank.projections_of(adapter)
    given = [state[key] for key in PROJECTIONS if key in state]
    if len(given) == len(PROJECTIONS) and not pair.equals(given[0], given[1]):
        raise CheckpointError(
            f"the projections given for adapter {name!r} differ from those it was made with; "
            "load the files under another name with load_adapter"
        )
    _fill(adapter, state, source=f"the state given for adapter {name!r}")


def _fill(adapter: Adapter, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy every tensor of ``state`` into ``adapter``, after all of them have been checked."""
    expected = dict(owned_tensors(adapter))
    check_state({key: tensor.shape for key, tensor in expected.items()}, state, source=source)
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(state[key])


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter_name: str = "default"
) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does.

    Both files are written aside and then moved into place, so that a crash or a full disk never
    leaves half a file.

    Args:
        model: an adapted model.
        directory: folder for the two files; made if it does not exist.
        adapter_name: the adapter to save.

    Returns:
        The folder.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or it is merged.
        CheckpointError: the folder cannot be written to.
    """
    bank = require_adapted(model)
    check_known(adapter_name, bank.adapters)
    adapter = bank.adapter(adapter_name)
    if adapter_name in bank.merged and adapter.copies.by_path:
        raise CheckpointError(
            f"adapter {adapter_name!r} is merged; unmerge the model before saving it"
        )
    state = adapter_state_dict(model, adapter_name)
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in state.items()}
    metadata = {"format": "pt", HASH: projections_hash(bank.projections_of(adapter))}
    folder = Path(directory)
    try:
        with moved_into(folder) as aside:
            save_file(tensors, aside / WEIGHTS_FILE, metadata=metadata)
            (aside / CONFIG_FILE).write_text(to_json(model, adapter), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"adapter {adapter_name!r} could not be saved to {folder}: {error}"
        ) from error
    return folder


def projections_hash(pair: Projections) -> str:
    """SHA-256 over the values of ``vera_A`` and ``vera_B`` in float32."""
    digest = hashlib.sha256()
    for tensor in (pair.vera_A, pair.vera_B):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_adapter(
    model: M,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    plan: str = "auto",
) -> M:
    """Load an adapter that vera_fx or PEFT saved; adapts the model if it is not adapted yet.

    It becomes active if no other adapter is; otherwise `set_adapter` switches to it.

    Args:
        model: a model, adapted or not.
        directory: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: name to give it, whatever it was called when it was saved.
        trainable: whether it may train; one loaded for inference never does.
        autocast_adapter_dtype: keep the vectors of half-precision models in float32, as PEFT does.
        plan: how to compute the branch, see `VeraConfig.plan`; checkpoints do not say.

    Returns:
        The same model.

    Raises:
        CheckpointError: the files are missing, damaged or do not fit the model.
        AdapterError: the name is taken or cannot be used.
        The model is unchanged after any of them.
    """
    folder = Path(directory)
    bank = bank_of(model) if is_adapted(model) else AdapterBank()
    check_name(adapter_name, bank.adapters)
    config = dataclasses.replace(read_json(folder), plan=plan)
    state, metadata = read_weights(folder)
    if not is_adapted(model):
        check_adaptable(model, config)
    layout = plan_of(model, config, folder, autocast=autocast_adapter_dtype)
    fresh = dataclasses.replace(layout, config=dataclasses.replace(config, init_weights=True))
    adapter = build_adapter(model, fresh, trainable=trainable)
    adapter.config = config
    _fill(adapter, state, source=str(folder / WEIGHTS_FILE))
    pair = _projections(model, layout, state, metadata, folder)
    if not is_adapted(model):
        adapt_with(model, adapter_name, adapter, pair, layout)
        return model
    adapter.projections = bank.share_projections(*pair, persistent=config.save_projection)
    install(model, bank, adapter_name, adapter, layout.targets)
    bank.activate(bank.active or (adapter_name,))
    return model


def plan_of(model: nn.Module, config: VeraConfig, folder: Path, *, autocast: bool) -> Blueprint:
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


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], str | None]:
    """An adapter's own tensors by their keys, and the hash of its projections if the files tell.

    Raises:
        CheckpointError: the files are missing or damaged.
    """
    state, metadata = read_weights(folder)
    pair = [state.pop(key) for key in PROJECTIONS if key in state]
    known = projections_hash(Projections(*pair)) if len(pair) == len(PROJECTIONS) else None
    own = {key: value for key, value in state.items() if not is_stray(key)}
    return own, metadata.get(HASH) or known


def _projections(
    model: nn.Module,
    plan: Blueprint,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    folder: Path,
) -> tuple[Tensor, Tensor]:
    """The projections an adapter was trained with: from its file, or drawn again and checked."""
    drawn_A, drawn_B = draw(model, plan)
    stored = [state[key] for key in PROJECTIONS if key in state]
    if len(stored) == len(PROJECTIONS):
        vera_A, vera_B = (value.to(drawn_A) for value in stored)
        _check_sizes(vera_A, vera_B, drawn_A, drawn_B, folder)
        return vera_A, vera_B
    if plan.config.save_projection:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} says save_projection=true, but {WEIGHTS_FILE} has no vera_A and vera_B"
        )
    _check_hash(drawn_A, drawn_B, metadata, folder)
    return drawn_A, drawn_B


def _check_sizes(A: Tensor, B: Tensor, drawn_A: Tensor, drawn_B: Tensor, folder: Path) -> None:
    fits = A.ndim == B.ndim == drawn_A.ndim and A.shape[0] == B.shape[1] == drawn_A.shape[0]
    if not fits or A.shape[1] < drawn_A.shape[1] or B.shape[0] < drawn_B.shape[0]:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)} do not fit; "
            f"this model and configuration need {tuple(drawn_A.shape)} and {tuple(drawn_B.shape)}"
        )


def _check_hash(A: Tensor, B: Tensor, metadata: Mapping[str, str], folder: Path) -> None:
    """Compare drawn projections with the hash of those that the adapter was trained with."""
    known = metadata.get(HASH)
    if known is None:
        warnings.warn(
            f"{folder} has no projections and no hash of them; they are drawn again from "
            "projection_prng_key, which torch does not promise to repeat on every platform",
            stacklevel=4,
        )
    elif known != projections_hash(Projections(A, B)):
        raise CheckpointError(
            f"{folder} has no projections, and those drawn from projection_prng_key are not the ones "
            "it was trained with (another torch version, or a base of another dtype); save it with "
            "save_projection=True where it was trained"
        )
