"""Projections left out of a program's file and drawn again from their seed when it is read."""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vera_fx.branches.kinds import kind_named
from vera_fx.branches.protocol import BranchKind
from vera_fx.errors import ExportError, shown

_DRAWN = 2**28
"""Numbers of projections that are drawn for a program whatever its size: 1 GiB."""


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


def redraw(known: Mapping[str, Any], held: int) -> dict[str, Tensor]:
    """Draw the projections that `describe` has described.

    Args:
        known: the description.
        held: how many numbers the program holds beside them.

    Raises:
        ExportError: those drawn are not the ones described, or too large beside the program.
    """
    kind, seed = kind_named(known.get("kind", "VeRA")), known["seed"]
    max_in, max_out = known.get("max_in"), known.get("max_out")
    if seed is None or max_in is None or max_out is None:
        raise ExportError("the program's projections were not drawn from a seed; save it with them")
    count = sum(map(math.prod, kind.shared_sizes(known["r"], max_in, max_out).values()))
    if count > max(_DRAWN, 4 * held):
        raise ExportError(f"the projections to be drawn for the program have {count:,} numbers")
    drawn = kind.parameters.redraw(seed, known["r"], max_in, max_out)
    named = {name: drawn[own] for own, name in names_of(kind).items() if name in known["tensors"]}
    return {name: _as_described(name, value, known) for name, value in named.items()}


def _as_described(name: str, value: Tensor, known: Mapping[str, Any]) -> Tensor:
    """The value through the dtypes, and with the zeros around it, that the program's had."""
    entry, found = known["tensors"][name], None
    for dtype in (*known["through"], entry["dtype"]):
        value = value.to(getattr(torch, dtype))
    shape = entry["shape"]
    if len(shape) == value.dim() and all(a >= b for a, b in zip(shape, value.shape, strict=True)):
        found = value.new_zeros(shape)
        found[tuple(slice(size) for size in value.shape)] = value
    if found is None or digest(found) != entry["sha256"]:
        raise ExportError(
            f"{name} as drawn from seed {known['seed']} is not what the program was exported with "
            "(another torch version, or projections that were not drawn here); "
            "save the program with projections=True"
        )
    return found


def restore(program: ExportedProgram, manifest: dict[str, Any]) -> None:
    """Draw projections that were left out, and compare what the manifest says of tensors with them.

    Raises:
        ExportError: they differ.
    """
    known = manifest.get("projections", {})
    state, shapes = program.state_dict, _placeholders(program)
    for name, entry in known.get("tensors", {}).items():
        if shapes.get(name) != tuple(entry["shape"]):
            raise ExportError(
                f"the manifest says {name} {tuple(entry['shape'])}, the graph {shapes.get(name)}"
            )
    if known.get("left_out"):
        state.update(redraw(known, sum(t.numel() for t in state.values())))
        known["left_out"] = False
    for name, entry in known.get("tensors", {}).items():
        if digest(state[name]) != entry["sha256"]:
            raise ExportError(f"{name} is damaged: its SHA-256 is not the one in the manifest")
    for key, entry in manifest.get("vectors", {}).items():
        name = entry["name"]
        if manifest["form"] == "constant" and name and shapes.get(name) != tuple(entry["shape"]):
            raise ExportError(
                f"the manifest says {key} is {shown(name)}, which the program has not"
            )


def _placeholders(program: ExportedProgram) -> dict[str, tuple[Any, ...]]:
    """The sizes that the graph takes for each tensor of its own, by name."""
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    nodes = (n for n in program.graph.nodes if n.op == "placeholder" and n.name in names)
    return {names[node.name]: tuple(node.meta["val"].shape) for node in nodes}


@contextlib.contextmanager
def left_out(program: ExportedProgram, known: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block ``program`` holds empty tensors in the place of its projections.

    Raises:
        ExportError: the program has none, or they cannot be drawn again.
    """
    if not known.get("tensors"):
        raise ExportError("this program has no projections to leave out")
    kept = redraw(known, sum(t.numel() for t in program.state_dict.values()))
    before = {name: program.state_dict[name] for name in kept}
    program.state_dict.update({name: torch.empty(0) for name in kept})
    try:
        yield
    finally:
        program.state_dict.update(before)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
