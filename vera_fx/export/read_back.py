"""Exported programs read back: where their sites are, and another adapter in the same program."""

import os
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from vera_fx.branches.kinds import kind_named
from vera_fx.checkpoint.state_dict import read_adapter
from vera_fx.checkpoint.weights_file import WEIGHTS_FILE
from vera_fx.errors import ExportError
from vera_fx.export.files import fit_vectors, manifest_of, target_of
from vera_fx.passes import SiteError, find_sites


def program_sites(program: ExportedProgram) -> tuple[str, ...]:
    """Names of the sites in a program, found again from its graph and metadata, in order.

    Raises:
        ExportError: vera_fx has not made the program, it was saved without its manifest, or the two
            do not agree.
    """
    manifest = _manifest(program)
    targets = [target_of(values) for values in manifest["targets"]]
    graph = program.module(check_guards=False)
    try:
        return tuple(site.name for site in find_sites(graph, targets).sites)
    except SiteError as error:
        raise ExportError(f"the program's graph does not fit its manifest: {error}") from error


def replace_adapter(program: ExportedProgram, directory: str | os.PathLike[str]) -> ExportedProgram:
    """Put a saved adapter in the place of the one that a program of form ``"constant"`` holds.

    Neither the model nor its library is needed.

    Args:
        program: a program from `export_program` or `load_program`; it is changed.
        directory: an adapter that `save_adapter` or PEFT has written.

    Returns:
        The same program.

    Raises:
        CheckpointError: the files are missing or damaged.
        ExportError: the program is of another form, or the adapter has other targets, another rank
            or other projections. The program is unchanged then.
    """
    manifest = _manifest(program)
    if manifest["form"] != "constant":
        raise ExportError(
            f"the adapter of a program of form {manifest['form']!r} cannot be replaced: "
            'give the vectors to each call of an "input" program, or export with form="constant"'
        )
    folder = Path(directory)
    vectors, sha256 = read_adapter(folder, kind_named(manifest.get("kind", "VeRA")))
    known = manifest["projections"]
    shown: dict[str, Any] = {"sha256": sha256 or known["sha256"], "seed": "unknown"}
    fitting = fit_vectors(manifest, shown, vectors, str(folder / WEIGHTS_FILE))
    state = program.state_dict
    state.update({name: value.to(state[name]) for name, value in fitting.items()})
    return program


def _manifest(program: ExportedProgram) -> dict[str, Any]:
    manifest = manifest_of(program)
    if not manifest:
        raise ExportError(
            "the program does not say what it was made from; export it with vera_fx.export_program, save "
            "it with save_program and read it with load_program"
        )
    return manifest
