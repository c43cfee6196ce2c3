"""Projections left out of a program's file and drawn again from their seed when it is read."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vera_fx.branches.kinds import kind_named
from vera_fx.branches.protocol import BranchKind
from vera_fx.errors import ExportError


def names_of(kind: BranchKind) -> dict[str, str]:
    """For each shared tensor of a kind what programs call it."""
    return {name: f"vera.{name}" for name in kind.parameters.shared}


def drawn_sizes(kind: BranchKind, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """``max_in`` and ``max_out`` that projections were drawn for."""
    found: dict[str, int] = {}
    for name, dims in kind.parameters.shared.items():
        sizes = zip(dims, tensors[name].shape, strict=True)
        found |= {f"max_{dim}": size for dim, size in sizes if dim != "r"}
    return found


def describe(
    program: ExportedProgram, drawn: Mapping[str, Any], kind: BranchKind
) -> dict[str, Any]:
    """What a reader needs to draw the projections that ``program`` holds, and to check them.

    Args:
        program: a program of form ``"constant"`` or ``"input"``; others hold none.
        drawn: seed, rank and sizes of the draw, and the dtypes it went through.
        kind: the kind of branch.
    """
    names = names_of(kind).values()
    held = {name: program.state_dict[name] for name in names if name in program.state_dict}
    tensors = {
        name: {"shape": list(value.shape), "dtype": _name(value.dtype), "sha256": digest(value)}
        for name, value in held.items()
    }
    return {**drawn, "kind": kind.name, "tensors": tensors, "left_out": False}


def digest(value: Tensor) -> str:
    """SHA-256 over the values in float32, row by row."""
    raw = value.detach().float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def redraw(known: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draw the projections that `describe` has described.

    Raises:
        ExportError: those drawn are not the ones described.
    """
    kind = kind_named(known.get("kind", "VeRA"))
    sizes = known["max_in"], known["max_out"]
    drawn = kind.parameters.redraw(known["seed"], known["r"], *sizes)
    found: dict[str, Tensor] = {}
    for own, name in names_of(kind).items():
        value = drawn[own]
        entry = known["tensors"].get(name)
        if entry is None:
            continue
        for dtype in (*known["through"], entry["dtype"]):
            value = value.to(getattr(torch, dtype))
        found[name] = value.new_zeros(entry["shape"])
        found[name][tuple(slice(size) for size in value.shape)] = value
        if digest(found[name]) != entry["sha256"]:
            raise ExportError(
                f"{name} as drawn from seed {known['seed']} is not what the program was exported with "
                "(another torch version, or projections that were not drawn here); "
                "save the program with projections=True"
            )
    return found


@contextlib.contextmanager
def left_out(program: ExportedProgram, known: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block ``program`` holds empty tensors in the place of its projections.

    Raises:
        ExportError: the program has none, or they cannot be drawn again.
    """
    if not known.get("tensors"):
        raise ExportError("this program has no projections to leave out")
    kept = redraw(known)
    before = {name: program.state_dict[name] for name in kept}
    program.state_dict.update({name: torch.empty(0) for name in kept})
    try:
        yield
    finally:
        program.state_dict.update(before)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
