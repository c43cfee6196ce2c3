"""What an adapter's weights file holds: PEFT's keys, checked before anything is done with them."""

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vera_fx.branches.protocol import BranchKind
from vera_fx.errors import CheckpointError, listing

WEIGHTS_FILE = "adapter_model.safetensors"
HASH = "vera_fx.projections_sha256"
KEY_PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."


def plain(path: str) -> str:
    """A path or key without the segments that wrappers of ``torch.compile`` put into it."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of an adapter's file, mapped into memory, and its metadata.

    Keys are as if nothing had been compiled when they were saved. The tensors are views of the
    file: whoever keeps one makes a copy, since the file may be written anew.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which vera_fx never loads; convert it with PEFT)"
        )
        hint = pickled if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"there is no {WEIGHTS_FILE} in {folder}{hint}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {plain(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return state, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def check_state(
    expected: Mapping[str, torch.Size],
    state: Mapping[str, Tensor],
    *,
    source: str,
    shared: Container[str] = (),
) -> None:
    """Refuse a state whose keys or sizes are not those of an adapter.

    Args:
        expected: the sizes that it must have, by key.
        state: what was read.
        source: where, for messages.
        shared: keys of projections, which may be there as well.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    missing = [key for key in expected if key not in state]
    unknown = [k for k in state if k not in expected and k not in shared and not is_stray(k)]
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not fit this model and configuration:"
            + (f"\n  missing: {listing(missing)}" if missing else "")
            + (f"\n  unknown: {listing(unknown)}" if unknown else "")
            + "\n  Was it trained on another model, or with other target_modules?"
        )
    for key, shape in expected.items():
        if state[key].shape != shape:
            raise CheckpointError(
                f"{source}: {key} has shape {tuple(state[key].shape)}, but this model and "
                f"configuration need {tuple(shape)}"
            )


def shared_keys(kind: BranchKind) -> dict[str, str]:
    """For each shared tensor of a kind its key in a file."""
    return {name: f"{SHARED_PREFIX}{name}" for name in kind.parameters.shared}


def take_shared(kind: BranchKind, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The shared tensors of a file by name; None if it does not hold all of them."""
    keys = shared_keys(kind)
    if not keys or any(key not in state for key in keys.values()):
        return None
    return {name: state[key] for name, key in keys.items()}


def is_stray(key: str) -> bool:
    """True for the copies of a saved module's bias that PEFT writes beside it with ``bias="all"``.

    PEFT 0.21.2 collects every key with "bias" in it, its own wrappers' inner names included.
    """
    return key.endswith("bias") and (".modules_to_save." in key or ".original_module." in key)
