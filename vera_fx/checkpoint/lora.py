"""An adapter as the LoRA adapter that computes the same: for tools that know LoRA only."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vera_fx._renamed import renamed
from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.names import one_adapter
from vera_fx.base.hf import base_model_name
from vera_fx.base.sharding import at_rest, whole
from vera_fx.branches.protocol import LoraForm
from vera_fx.checkpoint.peft_config import CONFIG_FILE, PEFT_VERSION, auto_mapping, exact_targets
from vera_fx.checkpoint.saved import path_of
from vera_fx.checkpoint.saving import replacing
from vera_fx.checkpoint.state_dict import owned_tensors
from vera_fx.checkpoint.weights_file import KEY_PREFIX
from vera_fx.errors import CheckpointError, ConfigError, shown
from vera_fx.graphs.runtime import require_adapted
from vera_fx.processes.wrapped import unwrapped
from vera_fx.products.kinds import is_flipped

ERRORS = "vera_fx.rank_errors"
_BIASES = {"none": "none", "all": "all", "targets": "lora_only"}


@renamed(adapter="adapter_name")
def to_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    rank: int | None = None,
) -> Path:
    """Write an adapter as the LoRA adapter of the same rank that is equal to it.

    No approximation, but each target gets matrices of its own, ``r * (in + out)`` numbers in place of
    VeRA's ``r + out``; a DVoRA adapter becomes LoRA with DoRA.

    Args:
        model: an adapted model.
        directory: folder for PEFT's two files, which is returned; made if it does not exist. Saved modules and trained
            biases go along.
        adapter_name: the adapter to write; None for the active one.
        rank: reduce to this rank by the best approximation of each target's update; `lora_errors`
            tells before, and the file's metadata after, what is lost. None is exact.

    Raises:
        ConfigError: ``rank`` is not between 1 and the adapter's.
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        CheckpointError: the folder cannot be written to. Files that were there are untouched.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    at_rest(model)
    name = one_adapter(bank.adapters, bank.active, adapter_name)
    chosen = bank.adapter(name)
    errors = {} if rank is None else {ERRORS: json.dumps(lora_errors(model, rank, name))}
    tensors = {key: value.detach().cpu().contiguous() for key, value in _lora(bank, chosen, rank)}
    return _write(path_of(directory), name, tensors, _config(model, chosen, rank), errors)


def _write(
    folder: Path, name: str, tensors: dict[str, Tensor], config: str, more: Mapping[str, str]
) -> Path:
    try:
        with replacing(folder, tensors, {CONFIG_FILE: config}, more) as (path, metadata):
            save_file(tensors, path, metadata=metadata)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"adapter {name!r} could not be written to {folder} as LoRA: {error}"
        ) from error
    return folder


@renamed(adapter="adapter_name")
def lora_errors(model: nn.Module, rank: int, adapter_name: str | None = None) -> dict[str, float]:
    """What `to_lora` would lose by a smaller rank.

    Args:
        model: an adapted model.
        rank: the rank to reduce to.
        adapter_name: the adapter; None for the active one.

    Returns:
        For each target the norm of what is lost, as a share of the norm of the whole update
        (Frobenius): 0 is exact, 1 is nothing left.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        ConfigError: ``rank`` is not between 1 and the adapter's.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    at_rest(model)
    chosen = bank.adapter(one_adapter(bank.adapters, bank.active, adapter_name))
    check_rank(rank, chosen.config.r)
    forms = _forms(bank, chosen)
    return {path: reduced(form.A, form.B, rank)[2] for path, form in forms}


def _forms(bank: AdapterBank, adapter: Adapter) -> Iterator[tuple[str, LoraForm]]:
    """The branch of every target as LoRA's."""
    shared = bank.projections_of(adapter).tensors
    for path in adapter.vectors.by_path:
        vectors, target = adapter.vectors_at(path), bank.structure.targets[path]
        if vectors is not None:
            own = {name: whole(tensor.detach()) for name, tensor in vectors.tensors.items()}
            yield path, adapter.kind.maths.lora(shared | own, target.in_features)


def _lora(bank: AdapterBank, adapter: Adapter, rank: int | None) -> Iterator[tuple[str, Tensor]]:
    """PEFT's LoRA keys and tensors: ``lora_A (r, in)``, ``lora_B (out, r)``, then the copies."""
    if rank is not None:
        check_rank(rank, adapter.config.r)
    for path, form in _forms(bank, adapter):
        lora_A, lora_B = (form.A, form.B) if rank is None else reduced(form.A, form.B, rank)[:2]
        yield f"{KEY_PREFIX}{path}.lora_A.weight", lora_A
        yield f"{KEY_PREFIX}{path}.lora_B.weight", lora_B
        yield from ((f"{KEY_PREFIX}{path}.{end}", value) for end, value in form.more.items())
    own = {id(t) for v in adapter.vectors.by_path.values() for t in v.parameters()}
    for key, tensor in owned_tensors(adapter):
        if id(tensor) not in own:
            yield key, whole(tensor).clone()


def _config(model: nn.Module, adapter: Adapter, rank: int | None) -> str:
    config, paths = adapter.config, list(adapter.vectors.by_path)
    r = config.r if rank is None else rank
    values: dict[str, Any] = {
        "auto_mapping": auto_mapping(model, config),
        "base_model_name_or_path": base_model_name(model),
        "bias": _BIASES[config.trains_biases],
        "fan_in_fan_out": any(is_flipped(model, path) for path in paths),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": config.dropout,
        "modules_to_save": list(config.saved_modules) or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": r,
        "target_modules": exact_targets(model, paths),
        "task_type": config.task_type,
        **adapter.kind.maths.lora_fields,
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def check_rank(rank: int, r: int) -> None:
    """Refuse a rank that is none, or not below that of the adapter.

    Raises:
        ConfigError: with the range.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= r:
        raise ConfigError(
            f"rank must be a whole number from 1 to the adapter's {r}, got {shown(rank)}; "
            "None keeps the rank, and is exact"
        )


def reduced(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of ``B A`` by matrices of ``rank`` (Eckart and Young).

    Args:
        A: ``(r, in)``.
        B: ``(out, r)``.
        rank: the new rank, at most r.

    Returns:
        ``A (rank, in)``, ``B (out, rank)``, and the norm of what is lost over the norm of ``B A``
        (Frobenius).
    """
    # The product itself is never formed: its singular values are those of two small triangles.
    Q_in, R_in = torch.linalg.qr(A.double().T)
    Q_out, R_out = torch.linalg.qr(B.double())
    U, S, Vt = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
    root, kept = S[:rank].sqrt(), min(rank, S.numel())
    new_A = root[:, None] * (Vt[:kept] @ Q_in.T)
    new_B = (Q_out @ U[:, :kept]) * root
    missing = rank - kept  # a target narrower than the rank: the rest is zero
    total = S.norm().item()
    error = S[rank:].norm().item() / total if total else 0.0
    return (
        F.pad(new_A, (0, 0, 0, missing)).to(A.dtype),
        F.pad(new_B, (0, missing)).to(B.dtype),
        error,
    )
