"""An adapted model as an ONNX file, by way of its exported program."""

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram

from vera_fx._renamed import renamed
from vera_fx._torch import tree_flatten_with_path, tree_unflatten
from vera_fx.disk.files import moved_into
from vera_fx.errors import ExportError, first_line
from vera_fx.export.files import MANIFEST, manifest_of, with_suffix
from vera_fx.export.module import AUTO, VECTORS
from vera_fx.export.program import export_call
from vera_fx.passes import ZeroMaskedRows


@renamed(adapter="adapter_name")
def export_onnx(  # noqa: D417, PLR0913
    model: nn.Module,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    adapter_name: str | None = None,
    form: str = "merged",
    dynamic_shapes: Mapping[str, Any] | str | None = AUTO,
    external_data: bool | None = None,
) -> Path:
    """Write one adapter over its base as an ONNX file.

    Inputs have the names of the call's arguments. With ``form="input"`` the vectors are inputs
    under the keys of a PEFT checkpoint, so that the arrays of an ``adapter_model.safetensors`` can
    be fed as they are, and one file serves every adapter with the same projections and targets.

    Args:
        model: as all others that are not named here, for `export_program`.
        path: the file, ``.onnx``; its folder is made if it does not exist.
        external_data: put the weights into ``<path>.data`` beside the file; None does so above
            2 GB, which a single ONNX file cannot hold.

    Returns:
        The path.

    Raises:
        ExportError: as for `export_program`, with its other errors; or an operator has no ONNX form, onnx
            or onnxscript is not installed, or the files are no valid model or cannot be written.
            Files that were there are untouched.
    """
    target = with_suffix(path, ".onnx", "ONNX files")
    _require()
    call, passes = (tuple(args), dict(kwargs or {})), (ZeroMaskedRows(),)
    # The passes say in operators what torch's attention means where ONNX's means something else.
    program = export_call(
        model, call, adapter=adapter_name, form=form, dynamic_shapes=dynamic_shapes, passes=passes
    )
    _write(_convert(program), target, external_data)
    return target


def _require() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401  # torch's converter needs it
    except ImportError as error:
        raise ExportError(f"{error}; ONNX files need: pip install 'vera-fx[onnx]'") from error


def _write(converted: Any, target: Path, external_data: bool | None) -> None:
    import onnx

    try:
        with moved_into(target.parent) as aside:
            converted.save(aside / target.name, external_data=external_data)
            onnx.checker.check_model(aside / target.name, full_check=True)
    except (OSError, RuntimeError, onnx.checker.ValidationError) as error:
        raise ExportError(f"the ONNX model could not be written to {target}: {error}") from error


def _convert(program: ExportedProgram) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(_input_names(program)),
                output_names=list(_output_names(program)),
            )
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot convert this program: {first_line(error)}\n"
            "  An operator of the model may have no ONNX form; the full reason is the exception above."
        ) from error
    ir_model = cast("Any", converted).model
    ir_model.metadata_props[MANIFEST] = json.dumps(manifest_of(program))
    return converted


def _input_names(program: ExportedProgram) -> Iterator[str]:
    """The argument's name for a tensor, its path for one inside a container, a vector's key."""
    signature = program.module_call_graph[0].signature
    names = (signature.forward_arg_names if signature is not None else None) or []
    positional, keywords = _numbered(program.call_spec.in_spec)
    arguments = dict(zip(names, positional, strict=False)) | keywords
    for path in _paths(arguments):
        yield ".".join(path[1:] if path[0] == VECTORS else path)


def _output_names(program: ExportedProgram) -> Iterator[str]:
    """The key for a tensor of a dict, ``output`` for a lone one, else ``output`` with its path."""
    result, taken = _numbered(program.call_spec.out_spec), set(_input_names(program))
    for path in _paths(result):
        name = ".".join(path if isinstance(result, dict) else ("output", *path))
        yield f"{name}.out" if name in taken else name


def _numbered(spec: Any) -> Any:
    return tree_unflatten(list(range(spec.num_leaves)), spec)


def _paths(tree: Any) -> Iterator[tuple[str, ...]]:
    for path, _ in tree_flatten_with_path(tree)[0]:
        yield tuple(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)
