"""Reads adapters from disk, vera_fx's and PEFT's, onto a model; nothing is made and then overwritten."""

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from vera_fx._torch import normal_tensors
from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import bank_of
from vera_fx.bank.blueprint import Blueprint
from vera_fx.bank.build import build_adapter, draw, install, settle
from vera_fx.bank.names import check_name
from vera_fx.checkpoint.embeddings import embedding_keys, take_embeddings
from vera_fx.checkpoint.saved import Saved, open_saved, path_of
from vera_fx.checkpoint.state_dict import assign, owned_tensors, plan_of
from vera_fx.checkpoint.weights_file import (
    HASH,
    WEIGHTS_FILE,
    Sized,
    check_dtype,
    check_finite,
    check_shared,
    check_state,
    projections_hash,
    shared_keys,
    take_shared,
)
from vera_fx.errors import CheckpointError
from vera_fx.model.adapt import adapt_with, check_adaptable
from vera_fx.model.model_class import is_adapted
from vera_fx.processes.wrapped import unwrapped

M = TypeVar("M", bound=nn.Module)

_DRAWN = 2**28
"""Numbers of projections that are drawn for a file whatever the model's size: 1 GiB."""


def load_adapter(
    model: M,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    plan: str = "auto",
    allow_nonfinite: bool = False,
) -> M:
    """Load an adapter that vera_fx or PEFT saved; adapts the model if it is not adapted yet.

    It becomes active if no other is; if so for inference, the model goes into eval mode.

    Args:
        model: a model, adapted or not; it is returned, out of whatever is wrapped around it.
        directory: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: name to give it, whatever it was called when it was saved.
        trainable: whether it may train.
        autocast_adapter_dtype: keep the vectors of half-precision models in float32, as PEFT does.
        plan: how to compute the branch, see `VeraConfig.plan`; checkpoints do not say.
        allow_nonfinite: also load values that are NaN or infinite, as PEFT does.

    Raises:
        CheckpointError: the files are missing, damaged or do not fit the model.
        AdapterError: the name is taken or cannot be used. The model is unchanged after both.
    """
    model = unwrapped(model)
    check_name(adapter_name, bank_of(model).adapters if is_adapted(model) else ())
    with normal_tensors(), open_saved(path_of(directory)) as saved:
        config = saved.config.replace(plan=plan)
        if not is_adapted(model):
            check_adaptable(model, config)
        layout = plan_of(model, config, saved.folder, autocast=autocast_adapter_dtype)
        adapter = build_adapter(model, layout, trainable=trainable, empty=True)
        pair = _filled(model, saved, layout, adapter, finite=not allow_nonfinite)
        _join(model, adapter_name, adapter, pair, layout)
    saved.warn_of_changes(stacklevel=2)
    return model


def _join(
    model: nn.Module,
    name: str,
    adapter: Adapter,
    projections: Mapping[str, Tensor],
    layout: Blueprint,
) -> None:
    """Put a finished adapter on the model; it becomes active if no other is.

    One that may train requires gradients from now on, as in PEFT: an optimiser that is made before
    the switch to it has to find it.
    """
    if is_adapted(model):
        bank = bank_of(model)
        install(model, bank, name, adapter, projections, layout.targets)
        bank.activate(bank.active or (name,))
        adapter.let_train(allowed=True, now=bank.enabled)
    else:
        adapt_with(model, name, adapter, projections, layout)
    if not adapter.trainable and bank_of(model).active == (name,):
        model.eval()


def _filled(
    model: nn.Module, saved: Saved, layout: Blueprint, adapter: Adapter, *, finite: bool
) -> dict[str, Tensor]:
    """Give an adapter without values those of its file; the projections are the result."""
    state = _read(model, saved, layout, adapter, finite=finite)
    own, rest = dict(owned_tensors(adapter)), dict(state)
    embeddings = list(take_embeddings(model, adapter, rest, own))
    assign(adapter, rest, layout.home)
    for path, frozen in embeddings:
        adapter.copies.put(path, frozen)
        adapter.frozen.add(path)
    adapter.origin = dict(saved.origin)
    return _projections(model, layout, state, saved)


def _read(
    model: nn.Module, saved: Saved, layout: Blueprint, adapter: Adapter, *, finite: bool
) -> dict[str, Tensor]:
    """The tensors of a file, read after all that its header says of them has been checked."""
    source, entries = str(saved.weights.path), saved.weights.entries
    shared, embeddings = shared_keys(layout.kind), embedding_keys(model, adapter)
    check_state(
        dict(owned_tensors(adapter)), entries, source=source, others={*shared.values(), *embeddings}
    )
    for key in embeddings & entries.keys():
        check_dtype(key, entries[key].dtype, torch.float32, source)
    stored = take_shared(layout.kind, entries, source)
    if stored is None and shared and layout.config.saves_shared:
        raise CheckpointError(
            f"the configuration in {saved.folder} says that the projections are saved with it, but "
            f"{WEIGHTS_FILE} has no {' and '.join(shared)}"
        )
    _check_sizes(stored or {}, layout, source)
    if stored is None:
        _check_drawable(model, layout, saved.folder)
    state = saved.weights.read()
    check_shared(layout.kind, state, saved.weights.metadata, source)
    if finite:
        check_finite(state, source)
    return state


def _projections(
    model: nn.Module, layout: Blueprint, state: Mapping[str, Tensor], saved: Saved
) -> dict[str, Tensor]:
    """The projections an adapter was trained with: from its file, or drawn again and checked."""
    stored = take_shared(layout.kind, state, str(saved.weights.path))
    if stored is not None:
        return _as_needed(model, layout, {n: settle(layout, t) for n, t in stored.items()})
    drawn = draw(layout)
    if drawn:
        _check_hash(drawn, saved.weights.metadata.get(HASH), saved.folder)
    return drawn


def _as_needed(model: nn.Module, layout: Blueprint, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections cut to this adapter's targets, which use no more of them.

    PEFT writes those of its first adapter into the files of all. If the bank has these already, it
    goes on sharing them.
    """
    if is_adapted(model) and any(p.equals(stored) for _, p in bank_of(model).shared.items()):
        return stored
    needed = layout.kind.shared_sizes(layout.config.r, *layout.sizes)
    return {
        name: tensor[tuple(map(slice, needed[name]))].clone() for name, tensor in stored.items()
    }


def _check_sizes(stored: Mapping[str, Sized], layout: Blueprint, source: str) -> None:
    needed = layout.kind.shared_sizes(layout.config.r, *layout.sizes)
    for name, dims in layout.kind.parameters.shared.items():
        if name not in stored:
            continue
        found = stored[name].shape
        fits = len(found) == len(dims) and all(
            have == want if dim == "r" else have >= want
            for have, want, dim in zip(found, needed[name], dims, strict=True)
        )
        if not fits:
            raise CheckpointError(
                f"{source}: {name} {tuple(found)} does not fit; this model and configuration need "
                f"{needed[name]}"
            )
        check_dtype(name, stored[name].dtype, torch.float32, source)


def _check_drawable(model: nn.Module, layout: Blueprint, folder: Path) -> None:
    """Refuse a draw that is large beside the model: the rank may come from anyone."""
    sizes = layout.kind.shared_sizes(layout.config.r, *layout.sizes).values()
    count, held = sum(map(math.prod, sizes)), sum(p.numel() for p in model.parameters())
    if count > max(_DRAWN, 4 * held):
        raise CheckpointError(
            f"{folder} has no projections, and those of rank {layout.config.r} have {count:,} numbers, "
            f"this model {held:,}; save it with its projections where it was trained"
        )


def _check_hash(drawn: Mapping[str, Tensor], known: str | None, folder: Path) -> None:
    """Compare drawn projections with the hash of those that the adapter was trained with."""
    if known is None:
        warnings.warn(
            f"{folder} has no projections and no hash of them; they are drawn again from "
            "projection_prng_key, which torch does not promise to repeat on every platform",
            stacklevel=4,
        )
    elif known != projections_hash(drawn):
        raise CheckpointError(
            f"{folder} has no projections, and those drawn from projection_prng_key are not the ones "
            "it was trained with (another torch version, or a base of another dtype); save it with "
            "save_projection=True where it was trained"
        )
