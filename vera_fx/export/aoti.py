"""An adapted model as an AOTInductor package: compiled ahead of time, for Python and C++."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch._inductor
from torch import nn
from torch.export import ExportedProgram

from vera_fx._renamed import renamed
from vera_fx.disk.files import archive_at, moved_into
from vera_fx.errors import ExportError, first_line
from vera_fx.export.files import MANIFEST, manifest_of, with_suffix
from vera_fx.export.module import AUTO
from vera_fx.export.program import export_call


@renamed(adapter="adapter_name")
def export_aoti(  # noqa: D417, PLR0913
    model: nn.Module,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    adapter_name: str | None = None,
    form: str = "merged",
    dynamic_shapes: Mapping[str, Any] | str | None = AUTO,
    inductor_configs: Mapping[str, Any] | None = None,
) -> Path:
    """Compile one adapter over its base with AOTInductor, for this machine's kind of processor.

    Neither Python's ``torch._inductor.aoti_load_package`` nor C++'s ``AOTIModelPackageLoader`` needs
    vera_fx. Adapters are swapped without building anew: with ``form="input"`` by the vectors of each
    call, with ``form="constant"`` by ``load_constants``; `program_vectors` makes what both take.

    Args:
        model: as all others that are not named here, for `export_program`.
        path: the package, ``.pt2``; its folder is made if it does not exist.
        inductor_configs: settings of Inductor for the build.

    Returns:
        The path.

    Raises:
        ExportError: as for `export_program`, with its other errors; or Inductor cannot build the package
            (it needs a C++ compiler), or write it. A package that was there is untouched.
    """
    target = with_suffix(path, ".pt2", "AOTInductor's packages")
    call = tuple(args), dict(kwargs or {})
    program = export_call(
        model, call, adapter=adapter_name, form=form, dynamic_shapes=dynamic_shapes
    )
    _build(program, target, inductor_configs or {})
    return target


def _build(program: ExportedProgram, target: Path, inductor_configs: Mapping[str, Any]) -> None:
    configs = {
        # Inductor writes small constants into its code, from where no other adapter takes them out.
        "always_keep_tensor_constants": True,
        "aot_inductor.metadata": {MANIFEST: json.dumps(manifest_of(program))},
        **inductor_configs,
    }
    try:
        with (
            moved_into(target.parent) as aside,
            archive_at(aside / target.name) as archive,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(
                program, package_path=archive, inductor_configs=configs
            )
    except Exception as error:
        raise ExportError(
            f"AOTInductor could not build {target}: {first_line(error)}\n"
            f"  C++ compiler found: {shutil.which('g++') or shutil.which('clang++') or 'none'}; the full "
            "reason is the exception above."
        ) from error
