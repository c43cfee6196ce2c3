"""What an adapter's weights file holds: PEFT's keys, checked before anything is done with them."""

import hashlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from vera_fx.branches.protocol import BranchKind
from vera_fx.disk.safetensors_file import WeightsFile, open_weights
from vera_fx.errors import CheckpointError, listing

WEIGHTS_FILE = "adapter_model.safetensors"
HASH = "vera_fx.projections_sha256"
KEY_PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plain(path: str) -> str:
    """A path or key without the segments that wrappers of ``torch.compile`` put into it."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def weights_in(folder: Path) -> WeightsFile:
    """The weights file of an adapter, opened; its keys are as if nothing had been compiled.

    Raises:
        CheckpointError: the file is missing or damaged, or has two keys that mean one tensor.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which vera_fx never loads; convert it with PEFT)"
        )
        hint = pickled if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"there is no {WEIGHTS_FILE} in {folder}{hint}")
    try:
        return open_weights(path, plain)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


class Sized(Protocol):
    """A tensor, or what a file says of one."""

    @property
    def shape(self) -> torch.Size:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        ...


def check_state(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Sized],
    *,
    source: str,
    others: Container[str] = (),
) -> None:
    """Refuse a state whose keys, sizes or dtypes are not those of an adapter.

    Args:
        expected: tensors of these sizes and of dtypes of these kinds must be there, by key.
        state: what was read, or what is about to be.
        source: where, for messages.
        others: keys that may be there as well.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or kind of dtype.
    """
    missing = [key for key in expected if key not in state]
    unknown = [k for k in state if k not in expected and k not in others and not is_stray(k)]
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not fit this model and configuration:"
            + (f"\n  missing: {listing(missing)}" if missing else "")
            + (f"\n  unknown: {listing(unknown)}" if unknown else "")
            + "\n  Was it trained on another model, or with other target_modules?"
        )
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {key} has shape {tuple(state[key].shape)}, but this model and "
                f"configuration need {tuple(tensor.shape)}"
            )
        check_dtype(key, state[key].dtype, tensor.dtype, source)


def check_dtype(key: str, found: torch.dtype, expected: torch.dtype, source: str) -> None:
    """Refuse a tensor of another kind of dtype: another float for a float, else the same.

    Raises:
        CheckpointError: with both.
    """
    if found != expected and not (found in FLOATS and expected.is_floating_point):
        wanted = (
            "no finite floats of 16 to 64 bits" if expected.is_floating_point else f"no {expected}"
        )
        raise CheckpointError(f"{source}: {key} holds values of dtype {found}, which are {wanted}")


ASK = "; allow_nonfinite=True loads them all the same"


def check_finite(state: Mapping[str, Tensor], source: str, *, remedy: str = ASK) -> None:
    """Refuse values that are no finite numbers.

    Args:
        state: tensors by key.
        source: where they are from, for the message.
        remedy: what to do, for the message.

    Raises:
        CheckpointError: with the first tensor that holds one.
    """
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{source}: {key} holds values that are no finite numbers{remedy}"
            )


def shared_keys(kind: BranchKind) -> dict[str, str]:
    """For each shared tensor of a kind its key in a file."""
    return {name: f"{SHARED_PREFIX}{name}" for name in kind.parameters.shared}


T = TypeVar("T")


def take_shared(kind: BranchKind, state: Mapping[str, T], source: str) -> dict[str, T] | None:
    """The shared tensors of a file by name; None if it holds none of them.

    Raises:
        CheckpointError: it holds some of them only.
    """
    keys = shared_keys(kind)
    missing = [key for key in keys.values() if key not in state]
    if len(missing) == len(keys):
        return None
    if missing:
        raise CheckpointError(f"{source} has projections, but no {listing(missing)}")
    return {name: state[key] for name, key in keys.items()}


def check_shared(
    kind: BranchKind, state: Mapping[str, Tensor], metadata: Mapping[str, str], source: str
) -> None:
    """Refuse projections that are not those whose hash their file has.

    Raises:
        CheckpointError: they are others.
    """
    stored, known = take_shared(kind, state, source), metadata.get(HASH)
    if stored is not None and known is not None and known != projections_hash(stored):
        raise CheckpointError(
            f"{source} is damaged: its projections are not those that were saved (SHA-256 in its "
            f"metadata, {HASH!r})"
        )


def projections_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the values of the projections in float32, in their kind's order."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_stray(key: str) -> bool:
    """True for the copies of a saved module's bias that PEFT writes beside it with ``bias="all"``.

    PEFT 0.21.2 collects every key with "bias" in it, its own wrappers' inner names included.
    """
    return key.endswith("bias") and (".modules_to_save." in key or ".original_module." in key)
