"""Reads adapters from disk, vera_fx's and PEFT's, onto a model; nothing is made and then overwritten."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.bank.build import (
    Blueprint,
    build_adapter,
    draw,
    home_of,
    install,
    projection_sizes,
    settle,
)
from vera_fx.bank.names import check_name
from vera_fx.bank.projections import Projections
from vera_fx.checkpoint.embeddings import take_embeddings
from vera_fx.checkpoint.peft_config import CONFIG_FILE, read_json, read_origin
from vera_fx.checkpoint.state_dict import assign, owned_tensors, plan_of, projections_hash
from vera_fx.checkpoint.weights_file import (
    HASH,
    PROJECTIONS,
    WEIGHTS_FILE,
    check_state,
    read_weights,
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

    It becomes active if no other adapter is; otherwise `set_adapter` switches to it. If it becomes
    active for inference, the model goes into eval mode, as in PEFT. What the file holds is never
    made first: vectors, saved modules and projections are those of the file.

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
    adapter = _adapter(model, layout, state, folder, trainable=trainable)
    pair = _projections(model, layout, state, metadata, folder)
    if is_adapted(model):
        adapter.projections = bank.share_projections(*pair, persistent=config.save_projection)
        install(model, bank, adapter_name, adapter, layout.targets)
        bank.activate(bank.active or (adapter_name,))
    else:
        adapt_with(model, adapter_name, adapter, pair, layout)
    if not trainable and bank_of(model).active == (adapter_name,):
        model.eval()
    return model


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
    check_state(shapes, rest, source=str(folder / WEIGHTS_FILE))
    assign(adapter, rest, home_of(model, layout))
    adapter.origin = read_origin(folder)
    for path, frozen in embeddings:
        adapter.copies.put(path, frozen)
        adapter.frozen.add(path)
    return adapter


def _projections(
    model: nn.Module,
    layout: Blueprint,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    folder: Path,
) -> tuple[Tensor, Tensor]:
    """The projections an adapter was trained with: from its file, or drawn again and checked."""
    stored = [state[key] for key in PROJECTIONS if key in state]
    if len(stored) == len(PROJECTIONS):
        _check_sizes(stored[0], stored[1], layout, folder)
        return settle(model, layout, stored[0]), settle(model, layout, stored[1])
    if layout.config.save_projection:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} says save_projection=true, but {WEIGHTS_FILE} has no vera_A and vera_B"
        )
    drawn = draw(model, layout)
    _check_hash(*drawn, metadata, folder)
    return drawn


def _check_sizes(A: Tensor, B: Tensor, layout: Blueprint, folder: Path) -> None:
    r, (max_in, max_out) = layout.config.r, projection_sizes(layout)
    fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] == r  # noqa: PLR2004
    if not fits or A.shape[1] < max_in or B.shape[0] < max_out:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)} do not fit; "
            f"this model and configuration need {(r, max_in)} and {(max_out, r)}"
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
