"""Embeddings of a vocabulary that has grown: saved with an adapter, kept by it when it is loaded.

New tokens have rows that no base checkpoint knows. PEFT writes the embeddings into the adapter's
file and overwrites the base's with them on loading. Here the adapter keeps them as its own, frozen:
the base stays what it is, and other adapters see their own.
"""

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.build import copied
from vera_fx.base.hf import base_model_name, embeddings_of, vocabulary_sizes
from vera_fx.checkpoint.weights_file import KEY_PREFIX, plain
from vera_fx.errors import CheckpointError, ConfigError


def embeddings_to_save(
    model: nn.Module, bank: AdapterBank, adapter: Adapter, choice: bool | str
) -> dict[str, Tensor]:
    """The base's embeddings under PEFT's keys, where they belong into the adapter's file.

    Args:
        model: the adapted model.
        bank: its bank.
        adapter: the adapter that is saved.
        choice: True or False, or ``"auto"``: if the vocabulary is not that of the base checkpoint.

    Raises:
        ConfigError: ``choice`` is something else, or the model has no embeddings.
        CheckpointError: an adapter is merged into them.
    """
    if choice not in {True, False, "auto"}:
        raise ConfigError(f"save_embedding_layers must be True, False or 'auto', got {choice!r}")
    if choice is False or (choice == "auto" and not _resized(model)):
        return {}
    found = dict(embeddings_of(model))
    if not found:
        raise ConfigError(
            f"save_embedding_layers=True, but the {type(model).__name__} has no "
            "get_input_embeddings or get_output_embeddings that names a module"
        )
    state: dict[str, Tensor] = {}
    for path, module in found.items():
        _check_unmerged(bank, path)
        for name, tensor in module.state_dict().items():
            state[f"{_prefix(path, adapter)}{name}"] = tensor
    return state


def _resized(model: nn.Module) -> bool:
    now, saved = vocabulary_sizes(model)
    name = base_model_name(model)
    if now is not None and saved is None and name is not None:
        warnings.warn(
            f"the configuration of the base model {name!r} is not on this machine, so it is assumed "
            "that its vocabulary was not resized; give save_embedding_layers=True or False",
            stacklevel=5,
        )
    return None not in {now, saved} and now != saved


def _check_unmerged(bank: AdapterBank, path: str) -> None:
    for name in bank.merged:
        adapter = bank.adapter(name)
        if path in adapter.vectors.by_path or path in adapter.copies.by_path:
            raise CheckpointError(
                f"adapter {name!r} is merged into {path!r}, which would be saved; unmerge the model first"
            )


def _prefix(path: str, adapter: Adapter) -> str:
    return f"{KEY_PREFIX}{plain(path)}.{'base_layer.' if path in adapter.vectors.by_path else ''}"


def embedding_keys(model: nn.Module, adapter: Adapter) -> set[str]:
    """The keys under which a file may bring embeddings for the model."""
    return {
        f"{_prefix(path, adapter)}{name}"
        for path, module in embeddings_of(model)
        for name in module._parameters
    }


def take_embeddings(
    model: nn.Module, adapter: Adapter, state: dict[str, Tensor], known: Mapping[str, object]
) -> Iterator[tuple[str, nn.Module]]:
    """Take the embeddings out of ``state``: ``(path, frozen copy)`` of those that the base lacks.

    Args:
        model: the model that the adapter is loaded for.
        adapter: the adapter, to know its targets.
        state: the tensors of the file, without those that are taken out.
        known: keys that mean something else.

    Raises:
        CheckpointError: they are of another vocabulary, or of a target whose weight differs.
    """
    for path, module in embeddings_of(model):
        prefix = _prefix(path, adapter)
        keys = {name: f"{prefix}{name}" for name in module._parameters}
        given = {n: state.pop(k) for n, k in keys.items() if k in state and k not in known}
        if not given or all(_is_same(path, module._parameters[n], v) for n, v in given.items()):
            continue
        if path in adapter.vectors.by_path:
            raise CheckpointError(
                f"the adapter targets {path!r}, and its file also brings a weight for it that differs "
                "from this model's; load that weight into the model first"
            )
        yield path, _frozen(module, given)


def _is_same(path: str, base: Tensor | None, value: Tensor) -> bool:
    if base is None or base.shape != value.shape:
        has = "none" if base is None else tuple(base.shape)
        raise CheckpointError(
            f"the adapter was trained with embeddings of shape {tuple(value.shape)} at {path!r}, this "
            f"model's are {has}; call model.resize_token_embeddings({value.shape[0]}) first"
        )
    return not base.is_meta and torch.equal(base, value.to(base))


def _frozen(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The module with other values, as buffers: they never train."""
    own = [*module.parameters(), *module.buffers()]
    frozen = copied(module, {id(tensor): tensor for tensor in own})
    for name, base in list(frozen._parameters.items()):
        if base is not None:
            del frozen._parameters[name]
            value = values.get(name)
            if value is None:
                frozen.register_buffer(name, base.detach(), persistent=False)
            else:
                device = torch.device("cpu") if base.is_meta else base.device
                frozen.register_buffer(name, value.to(device=device, dtype=base.dtype, copy=True))
    return frozen
