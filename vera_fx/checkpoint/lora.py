"""An adapter as the LoRA adapter that computes the same: for tools that know LoRA only."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.names import one_adapter
from vera_fx.base.hf import base_model_name
from vera_fx.base.targets import is_conv1d
from vera_fx.checkpoint.lora_rank import check_rank, reduced
from vera_fx.checkpoint.peft_config import CONFIG_FILE, PEFT_VERSION, auto_mapping, exact_targets
from vera_fx.checkpoint.state_dict import owned_tensors
from vera_fx.checkpoint.weights_file import KEY_PREFIX, WEIGHTS_FILE
from vera_fx.errors import CheckpointError
from vera_fx.files import moved_into
from vera_fx.graphs.runtime import require_adapted

ERRORS = "vera_fx.rank_errors"
_BIASES = {"none": "none", "all": "all", "vera_only": "lora_only"}


def to_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter: str | None = None,
    *,
    rank: int | None = None,
) -> Path:
    """Write an adapter as the LoRA adapter of the same rank that is equal to it.

    ``lora_A = diag(d) A``, ``lora_B = diag(b) B`` and ``lora_alpha = r``, so that LoRA's
    ``(alpha / r) lora_B lora_A`` is VeRA's ``diag(b) B diag(d) A``: no approximation, but each target
    gets matrices of its own, ``r * (in + out)`` numbers in place of VeRA's ``r + out``.

    Args:
        model: an adapted model.
        directory: folder for ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's
            LoRA layout; made if it does not exist. Saved modules and trained biases go along.
        adapter: the adapter to write; None for the active one.
        rank: reduce to this rank by the best approximation of each target's update; `lora_errors`
            tells before, and the file's metadata after, what is lost. None is exact.

    Returns:
        The folder.

    Raises:
        ConfigError: ``rank`` is not between 1 and the adapter's.
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        CheckpointError: the adapter is merged and has modules of its own, or the folder cannot be
            written to. Files that were there are untouched.
    """
    bank = require_adapted(model)
    name = one_adapter(bank.adapters, bank.active, adapter)
    chosen = bank.adapter(name)
    if name in bank.merged and chosen.copies.by_path:
        raise CheckpointError(f"adapter {name!r} is merged; unmerge the model before to_lora")
    tensors = {key: value.detach().cpu().contiguous() for key, value in _lora(bank, chosen, rank)}
    metadata = {"format": "pt"}
    if rank is not None:
        metadata[ERRORS] = json.dumps(lora_errors(model, rank, name))
    folder = Path(directory)
    try:
        with moved_into(folder) as aside:
            save_file(tensors, aside / WEIGHTS_FILE, metadata=metadata)
            (aside / CONFIG_FILE).write_text(_config(model, chosen, rank), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"adapter {name!r} could not be written to {folder} as LoRA: {error}"
        ) from error
    return folder


def lora_errors(model: nn.Module, rank: int, adapter: str | None = None) -> dict[str, float]:
    """What `to_lora` would lose by a smaller rank.

    Args:
        model: an adapted model.
        rank: the rank to reduce to.
        adapter: the adapter; None for the active one.

    Returns:
        For each target the norm of what is lost, as a share of the norm of the whole update
        (Frobenius): 0 is exact, 1 is nothing left.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        ConfigError: ``rank`` is not between 1 and the adapter's.
    """
    bank = require_adapted(model)
    chosen = bank.adapter(one_adapter(bank.adapters, bank.active, adapter))
    check_rank(rank, chosen.config.r)
    return {path: reduced(A, B, rank)[2] for path, A, B in _matrices(bank, chosen)}


def _matrices(bank: AdapterBank, adapter: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    """``(path, diag(d) A, diag(b) B)`` of every target: ``(r, in)`` and ``(out, r)``."""
    pair = bank.projections_of(adapter)
    for path in adapter.vectors.by_path:
        vectors, target = adapter.vectors_at(path), bank.targets[path]
        if vectors is None:
            continue
        d, b = vectors.vera_lambda_d.detach(), vectors.vera_lambda_b.detach()
        A, B = pair.vera_A[:, : target.in_features], pair.vera_B[: target.out_features]
        yield path, d[:, None] * A, b[:, None] * B


def _lora(bank: AdapterBank, adapter: Adapter, rank: int | None) -> Iterator[tuple[str, Tensor]]:
    """PEFT's LoRA keys and tensors: ``lora_A (r, in)``, ``lora_B (out, r)``, then the copies."""
    if rank is not None:
        check_rank(rank, adapter.config.r)
    for path, A, B in _matrices(bank, adapter):
        lora_A, lora_B = (A, B) if rank is None else reduced(A, B, rank)[:2]
        yield f"{KEY_PREFIX}{path}.lora_A.weight", lora_A
        yield f"{KEY_PREFIX}{path}.lora_B.weight", lora_B
    for key, tensor in owned_tensors(adapter):
        if not key.endswith((".vera_lambda_d", ".vera_lambda_b")):
            yield key, tensor.clone()


def _config(model: nn.Module, adapter: Adapter, rank: int | None) -> str:
    config, paths = adapter.config, list(adapter.vectors.by_path)
    r = config.r if rank is None else rank
    values: dict[str, Any] = {
        "auto_mapping": auto_mapping(model, config),
        "base_model_name_or_path": base_model_name(model),
        "bias": _BIASES[config.bias],
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(path)) for path in paths),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": config.vera_dropout,
        "modules_to_save": list(config.saved_modules) or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": r,
        "target_modules": exact_targets(model, paths),
        "task_type": config.task_type,
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
