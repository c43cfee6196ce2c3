"""An adapted model as an ExecuTorch program, with the adapter's data in a file of its own."""

# pyright: reportMissingImports=false
# ExecuTorch is no part of the development environment.

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from vera_fx.errors import ExportError, first_line
from vera_fx.export.files import MANIFEST, manifest_of
from vera_fx.export.module import AUTO
from vera_fx.export.program import export_call
from vera_fx.export.vectors import program_vectors
from vera_fx.files import moved_into
from vera_fx.passes import ContiguousAttention

_ALIGNMENT = 16


def export_executorch(  # noqa: PLR0913
    model: nn.Module,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    adapter: str | None = None,
    form: str = "merged",
    dynamic_shapes: Mapping[str, Any] | str | None = AUTO,
    partitioners: Sequence[Any] = (),
) -> Path:
    """Lower one adapter over its base to ExecuTorch.

    ExecuTorch plans its memory ahead: a size that is left open may later be smaller than in the
    example call, and larger only up to the ``max`` of a ``torch.export.Dim``. Inputs are given by
    position: the call's tensors, then the vectors, then the index of form ``"rows"``.

    With ``form="constant"`` the adapter's own tensors go into ``<stem>.ptd`` beside the program,
    which loads them by ``data_path``; `export_executorch_data` writes such files for others.

    Args:
        model: an adapted model in eval mode.
        path: the program, ``.pte``; its folder is made if it does not exist.
        args: positional arguments of an example call.
        kwargs: keyword arguments of an example call.
        adapter: the adapter to export; None for the active one.
        form: as for `export_program`.
        dynamic_shapes: as for `export_program`.
        partitioners: ExecuTorch's, which give parts of the program to a backend such as XNNPACK;
            none for its portable operators.

    Returns:
        The path.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        ExportError: as for `export_program`; or ExecuTorch is not installed or cannot lower the
            program, a backend takes in the tensors that were to stay apart, or the files cannot be
            written. Files that were there are untouched.
        CaptureError: the call cannot be captured.
    """
    target = Path(path)
    if target.suffix != ".pte":
        raise ExportError(f"{target} must end in .pte, the suffix of ExecuTorch's programs")
    _require()
    call = tuple(args), dict(kwargs or {})
    passes = (ContiguousAttention(),)
    program = export_call(
        model, call, adapter=adapter, form=form, dynamic_shapes=dynamic_shapes, passes=passes
    )
    lowered = _lower(program, target.stem, partitioners)
    try:
        with moved_into(target.parent) as aside:
            with (aside / target.name).open("wb") as file:
                lowered.write_to_file(file)
            if form == "constant":
                lowered.write_tensor_data_to_file(aside)
    except OSError as error:
        raise ExportError(f"the program could not be written to {target}: {error}") from error
    return target


def export_executorch_data(
    model: nn.Module,
    path: str | os.PathLike[str],
    program: str | os.PathLike[str],
    *,
    adapter: str | None = None,
) -> Path:
    """Write an adapter's data for a program of form ``"constant"`` that `export_executorch` wrote.

    Args:
        model: an adapted model.
        path: the data file, ``.ptd``; its folder is made if it does not exist.
        program: the program's path, ``.pte``.
        adapter: the adapter; None for the active one.

    Returns:
        The path.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        ExportError: the program is missing or of another form; the adapter's targets, rank or
            projections are not the program's; ExecuTorch is not installed; or the file cannot be
            written. A file that was there is untouched.
    """
    target = Path(path)
    if target.suffix != ".ptd":
        raise ExportError(f"{target} must end in .ptd, the suffix of ExecuTorch's data files")
    _require()
    from executorch.runtime import Runtime

    if not Path(program).is_file():
        raise ExportError(f"there is no program at {program}")
    # The program's constants are not needed to ask it for its manifest.
    manifest = manifest_of(Runtime.get().load_program(Path(program)))
    if manifest.get("form") != "constant":
        raise ExportError(
            f"{program} takes no data file: its form is {manifest.get('form', 'unknown')!r}, "
            'not "constant"'
        )
    blob = _flat_tensors(program_vectors(model, adapter, manifest))
    try:
        with moved_into(target.parent) as aside, (aside / target.name).open("wb") as file:
            blob.write_to_file(file)
    except OSError as error:
        raise ExportError(f"the data could not be written to {target}: {error}") from error
    return target


def _require() -> None:
    try:
        import executorch.exir  # noqa: F401
    except ImportError as error:
        raise ExportError(f"{error}; this needs: pip install 'vera-fx[executorch]'") from error


def _lower(program: Any, stem: str, partitioners: Sequence[Any]) -> Any:
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    manifest = manifest_of(program)
    constant = manifest["form"] == "constant"
    names = {entry["name"] for entry in manifest["vectors"].values() if entry["name"]}
    apart: set[str] = set()

    def file_of(node: fx.Node) -> str | None:
        name = edge.exported_program().graph_signature.inputs_to_buffers.get(node.name)
        if not constant or name not in names:
            return None
        apart.add(name)
        return stem

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            edge = to_edge_transform_and_lower(
                program,
                partitioner=list(partitioners),
                constant_methods={MANIFEST: json.dumps(manifest)},
            )
            lowered = edge.to_executorch(ExecutorchBackendConfig(external_constants=file_of))
    except Exception as error:
        raise ExportError(
            f"ExecuTorch cannot lower this program: {first_line(error)}\n"
            "  The full reason is the exception above."
        ) from error
    _check_sizes(program, edge.exported_program())
    if constant and apart != names:
        raise ExportError(
            f"a partitioner took {min(names - apart)} into its backend's part of the program, from "
            'where no other adapter can take its place; use form="input", or no partitioner'
        )
    return lowered


def _check_sizes(program: ExportedProgram, lowered: ExportedProgram) -> None:
    """Refuse a program in which lowering has fixed a size.

    torch decides comparisons of sizes and strides by the example's numbers: where a batch of 3 meets
    a product of width 3 * hidden, it may take the two for one.
    """
    for name in program.graph_signature.user_inputs:
        before, after = (_value(graph, name) for graph in (program.graph, lowered.graph))
        for dim, (size, now) in enumerate(zip(before.shape, after.shape, strict=True)):
            if not is_concrete_int(size) and is_concrete_int(now):
                raise ExportError(
                    f"ExecuTorch's lowering fixes dimension {dim} of input {name} to {int(now)}, which the "
                    "program leaves open; give an example call with another size there, or fix it "
                    "by dynamic_shapes"
                )


def _value(graph: fx.Graph, name: object) -> Tensor:
    return next(n.meta["val"] for n in graph.nodes if n.op == "placeholder" and n.name == name)


def _flat_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """Tensors in the format of ``.ptd`` files; ExecuTorch 1.5 has no public function for it."""
    from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
    from executorch.exir.tensor import scalar_type_enum
    from executorch.exir.tensor_layout import TensorLayout
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    buffers: list[bytes] = []
    entries: dict[str, Any] = {}
    for name, value in tensors.items():
        layout = TensorLayout(scalar_type_enum(value.dtype), [*value.shape], [*range(value.ndim)])
        entries[name] = DataEntry(len(buffers), _ALIGNMENT, layout)
        flat = value.detach().cpu().contiguous().reshape(-1)
        buffers.append(flat.view(torch.uint8).numpy().tobytes())
    return FlatTensorSerializer().serialize(DataPayload(buffers, entries))
