"""Reads adapters from disk, vera_fx's and PEFT's, onto a model; nothing is made and then overwritten."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import bank_of
from vera_fx.bank.blueprint import Blueprint
from vera_fx.bank.build import build_adapter, draw, install, settle
from vera_fx.bank.names import check_name
from vera_fx.checkpoint.embeddings import take_embeddings
from vera_fx.checkpoint.peft_config import CONFIG_FILE, read_json, read_origin
from vera_fx.checkpoint.state_dict import assign, owned_tensors, plan_of, projections_hash
from vera_fx.checkpoint.weights_file import (
    HASH,
    WEIGHTS_FILE,
    check_state,
    read_weights,
    shared_keys,
    take_shared,
)
from vera_fx.errors import CheckpointError
from vera_fx.model.adapt import adapt_with, check_adaptable
from vera_fx.model.model_class import is_adapted

M = TypeVar("M", bound=nn.Module)


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

    It becomes active if no other is; if so for inference, the model goes into eval mode.

    Args:
        model: a model, adapted or not; it is returned.
        directory: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: name to give it, whatever it was called when it was saved.
        trainable: whether it may train.
        autocast_adapter_dtype: keep the vectors of half-precision models in float32, as PEFT does.
        plan: how to compute the branch, see `VeraConfig.plan`; checkpoints do not say.

    Raises:
        CheckpointError: the files are missing, damaged or do not fit the model.
        AdapterError: the name is taken or cannot be used. The model is unchanged after both.
    """
    folder = Path(directory)
    check_name(adapter_name, bank_of(model).adapters if is_adapted(model) else ())
    config, (state, metadata) = read_json(folder).replace(plan=plan), read_weights(folder)
    if not is_adapted(model):
        check_adaptable(model, config)
    layout = plan_of(model, config, folder, autocast=autocast_adapter_dtype)
    adapter = _adapter(model, layout, state, folder, trainable=trainable)
    pair = _projections(layout, state, metadata, folder)
    if is_adapted(model):
        _join(model, adapter_name, adapter, pair, layout)
    else:
        adapt_with(model, adapter_name, adapter, pair, layout)
    if not trainable and bank_of(model).active == (adapter_name,):
        model.eval()
    return model


def _join(
    model: nn.Module,
    name: str,
    adapter: Adapter,
    projections: Mapping[str, Tensor],
    layout: Blueprint,
) -> None:
    """Put a finished adapter beside others; it becomes active if none is."""
    bank = bank_of(model)
    install(model, bank, name, adapter, projections, layout.targets)
    bank.activate(bank.active or (name,))


def _adapter(
    model: nn.Module,
    layout: Blueprint,
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    trainable: bool,
) -> Adapter:
    """The adapter with the tensors of ``state``, after all of them have been checked."""
    adapter = build_adapter(model, layout, trainable=trainable, empty=True)
    shapes = {key: tensor.shape for key, tensor in owned_tensors(adapter)}
    rest = dict(state)
    embeddings = list(take_embeddings(model, adapter, rest, shapes))
    known = shared_keys(layout.kind).values()
    check_state(shapes, rest, source=str(folder / WEIGHTS_FILE), shared=known)
    assign(adapter, rest, layout.home)
    adapter.origin = read_origin(folder)
    for path, frozen in embeddings:
        adapter.copies.put(path, frozen)
        adapter.frozen.add(path)
    return adapter


def _projections(
    layout: Blueprint, state: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path
) -> dict[str, Tensor]:
    """The projections an adapter was trained with: from its file, or drawn again and checked."""
    stored = take_shared(layout.kind, state)
    if stored is not None:
        _check_sizes(stored, layout, folder)
        return {name: settle(layout, tensor) for name, tensor in stored.items()}
    keys = shared_keys(layout.kind)
    if keys and layout.config.saves_shared:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} says that the projections are saved with it, but {WEIGHTS_FILE} "
            f"has no {' and '.join(keys)}"
        )
    drawn = draw(layout)
    if keys:
        _check_hash(drawn, metadata, folder)
    return drawn


def _check_sizes(stored: Mapping[str, Tensor], layout: Blueprint, folder: Path) -> None:
    r = layout.config.r
    needed = layout.kind.shared_sizes(r, *layout.sizes)
    for name, dims in layout.kind.parameters.shared.items():
        found = stored[name].shape
        fits = len(found) == len(dims) and all(
            have == want if dim == "r" else have >= want
            for have, want, dim in zip(found, needed[name], dims, strict=True)
        )
        if not fits:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: {name} {tuple(found)} does not fit; this model and "
                f"configuration need {needed[name]}"
            )


def _check_hash(drawn: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path) -> None:
    """Compare drawn projections with the hash of those that the adapter was trained with."""
    known = metadata.get(HASH)
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
