"""Exported programs on disk: whole or not at all, with a manifest of what they were made from."""

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vera_fx._torch import load_archive
from vera_fx.checkpoint.weights_file import KEY_PREFIX
from vera_fx.disk.files import archive_at, moved_into
from vera_fx.errors import ExportError
from vera_fx.export.checks.archive import MANIFEST_FILE, check_archive
from vera_fx.export.checks.manifest import read_manifest
from vera_fx.export.projections import left_out, restore
from vera_fx.passes import ReadWeight, Target

MANIFEST = "vera_fx"


def with_suffix(path: str | os.PathLike[str], suffix: str, whose: str) -> Path:
    """The path, which must end in ``suffix``.

    Raises:
        ExportError: it does not.
    """
    target = Path(path)
    if target.suffix != suffix:
        raise ExportError(f"{target} must end in {suffix}, the suffix of {whose}")
    return target


def manifest_of(program: Any) -> dict[str, Any]:
    """What the program was made from; empty for a program that vera_fx has not made or loaded.

    Args:
        program: an ``ExportedProgram``, an AOTInductor package as torch loads it, an ExecuTorch program
            as its runtime loads it, or a manifest.

    Raises:
        ExportError: it is none of these, or its manifest is of an unknown form.
    """
    if isinstance(program, Mapping):
        return read_manifest(json.dumps(dict(program)), "the mapping given")
    if isinstance(program, ExportedProgram):
        return program.graph_module.meta.get(MANIFEST, {})
    if hasattr(program, "load_method"):
        known = MANIFEST in program.method_names
        text = program.load_method(MANIFEST).execute([])[0] if known else ""
    elif hasattr(program, "get_metadata"):
        text = program.get_metadata().get(MANIFEST, "")
    else:
        raise ExportError(
            f"a {type(program).__name__} is no program; give what load_program returned"
        )
    return read_manifest(text, "the program")


def set_manifest(program: ExportedProgram, manifest: Mapping[str, Any]) -> None:
    """Keep the manifest with the program, from where `save_program` takes it."""
    program.graph_module.meta[MANIFEST] = dict(manifest)


def target_entry(target: Target) -> dict[str, Any]:
    """A target as a manifest has it."""
    return {
        "path": target.path,
        "in_features": target.in_features,
        "out_features": target.out_features,
        "layout": target.product.layout,
        "weights": list(target.weights),
        "aliases": list(target.aliases),
    }


def target_of(entry: Mapping[str, Any]) -> Target:
    """The target that an entry of a manifest describes."""
    return Target(
        entry["path"],
        entry["in_features"],
        entry["out_features"],
        ReadWeight(entry["layout"]),
        tuple(entry["weights"]),
        tuple(entry["aliases"]),
    )


def constant_name(key: str) -> str:
    """What a program calls a tensor of the adapter that a checkpoint has under ``key``."""
    return f"vera.{key.removeprefix(KEY_PREFIX)}"


def save_program(
    program: ExportedProgram, path: str | os.PathLike[str], *, projections: bool = True
) -> Path:
    """Write a program as a ``.pt2`` file that ``torch.export.load`` reads.

    The file is written aside and then moved into place: after an error the target is what it was.

    Args:
        program: a program, from `export_program` or from anywhere else.
        path: the file; its folder is made if it does not exist.
        projections: False leaves them out of a program that holds them; `load_program` then draws
            them again from their seed, and compares them with their hash.

    Returns:
        The path.

    Raises:
        ExportError: the path does not end in ``.pt2``, the projections cannot be drawn again, or the
            file cannot be written.
    """
    target = with_suffix(path, ".pt2", "torch.export's files")
    manifest = manifest_of(program)
    known = manifest.get("projections", {})
    if not projections:
        manifest = {**manifest, "projections": {**known, "left_out": True}}
    extra = {MANIFEST_FILE: json.dumps(manifest)}
    without = contextlib.nullcontext() if projections else left_out(program, known)
    try:
        with (
            without,
            moved_into(target.parent) as aside,
            archive_at(aside / target.name) as archive,
        ):
            torch.export.save(program, archive, extra_files=extra)
    except OSError as error:
        raise ExportError(f"the program could not be saved to {target}: {error}") from error
    return target


def load_program(
    path: str | os.PathLike[str], *, namespaces: Collection[str] = ()
) -> ExportedProgram:
    """Read a program and its manifest, without running anything that the file says.

    What ``torch.export.load`` would take from a file and run is refused before torch sees it: pickled
    weights, objects and example inputs, sizes and guards that are more than arithmetic, calls of anything
    but operators, compiled code. To run a program of your own, ``torch.export.load`` does as well.

    Args:
        path: the file.
        namespaces: of operators beside torch's own that the program may call (``torch.ops.<namespace>``).

    Raises:
        ExportError: there is no such file, it is damaged or holds more than a program needs; or it was
            saved without projections, and those drawn from the seed are not the program's.
    """
    try:
        with Path(path).open("rb") as file:
            text = check_archive(file, namespaces)
            manifest = read_manifest(text or b"", path)
            program, _ = load_archive(file)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{path} cannot be read as a program: {error}") from error
    restore(program, manifest)
    set_manifest(program, manifest)
    return program


def fit_vectors(
    manifest: Mapping[str, Any],
    projections: Mapping[str, Any],
    vectors: Mapping[str, Tensor],
    name: str,
) -> dict[str, Tensor]:
    """An adapter's tensors under the names that a program has for them.

    Args:
        manifest: the program's.
        projections: what the adapter's projections are, as in a manifest.
        vectors: the adapter's tensors by their keys in a checkpoint.
        name: the adapter's name.

    Raises:
        ExportError: the adapter does not fit; with the first difference.
    """
    if manifest.get("form") not in {"input", "constant", "rows"}:
        raise ExportError(
            f"the program takes no vectors: its form is {manifest.get('form', 'unknown')!r}, "
            'not "input", "constant" or "rows"'
        )
    wanted: dict[str, dict[str, Any]] = manifest["vectors"]
    for key in sorted(wanted.keys() ^ vectors.keys()):
        owner = f"adapter {name!r}" if key in wanted else "the program"
        raise ExportError(f"adapter {name!r} does not fit the program: {owner} has no {key}")
    for key, entry in wanted.items():
        if list(vectors[key].shape) != entry["shape"]:
            raise ExportError(
                f"adapter {name!r} does not fit the program: {key} has shape "
                f"{tuple(vectors[key].shape)}, the program takes {tuple(entry['shape'])}"
            )
    if manifest["projections"]["sha256"] != projections["sha256"]:
        raise ExportError(
            f"adapter {name!r} does not fit the program: it was trained with other projections "
            f"(seed {projections['seed']}) than the program holds (seed {manifest['projections']['seed']})"
        )
    return {entry["name"]: vectors[key] for key, entry in wanted.items() if entry["name"]}
