"""An adapted model as an ExecuTorch program, with the adapter's data in a file of its own."""

# pyright: reportMissingImports=false
# ExecuTorch is no part of the development environment.

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from vera_fx._renamed import renamed
from vera_fx.disk.files import moved_into
from vera_fx.errors import ExportError, first_line
from vera_fx.export.files import MANIFEST, manifest_of, with_suffix
from vera_fx.export.module import AUTO
from vera_fx.export.program import export_call
from vera_fx.export.vectors import program_vectors
from vera_fx.passes import ContiguousAttention

_ALIGNMENT = 16


@renamed(adapter="adapter_name")
def export_executorch(  # noqa: D417, PLR0913
    model: nn.Module,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    adapter_name: str | None = None,
    form: str = "merged",
    dynamic_shapes: Mapping[str, Any] | str | None = AUTO,
    partitioners: Sequence[Any] = (),
) -> Path:
    """Lower one adapter over its base to ExecuTorch.

    Memory is planned ahead: an open size may later be smaller than in the example call, and larger
    only up to the ``max`` of a ``torch.export.Dim``. Inputs are given by position: the call's
    tensors, the vectors, the index of form ``"rows"``. With ``form="constant"`` the adapter's tensors
    go into ``<stem>.ptd`` beside the program (`export_executorch_data` writes those of others).

    Args:
        model: as all others that are not named here, for `export_program`.
        path: the program, ``.pte``; its folder is made if it does not exist.
        partitioners: ExecuTorch's, which give parts of the program to a backend such as XNNPACK.

    Raises:
        ExportError: as for `export_program`, with its other errors; or ExecuTorch is not installed or
            cannot lower the program, or files cannot be written. Those that were there are untouched.
    """
    target = with_suffix(path, ".pte", "ExecuTorch's programs")
    _require()
    call, passes = (tuple(args), dict(kwargs or {})), (ContiguousAttention(),)
    program = export_call(
        model, call, adapter=adapter_name, form=form, dynamic_shapes=dynamic_shapes, passes=passes
    )
    lowered = _lower(program, target.stem, partitioners)
    with _written("program", target) as aside:
        with (aside / target.name).open("wb") as file:
            lowered.write_to_file(file)
        if form == "constant":
            lowered.write_tensor_data_to_file(aside)
    return target


@renamed(adapter="adapter_name")
def export_executorch_data(
    model: nn.Module,
    path: str | os.PathLike[str],
    program: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
) -> Path:
    """Write an adapter's data for a program of form ``"constant"`` that `export_executorch` wrote.

    Args:
        model: an adapted model.
        path: the data file, ``.ptd``; its folder is made if it does not exist.
        program: the program's path, ``.pte``.
        adapter_name: the adapter; None for the active one.

    Returns:
        The path.

    Raises:
        AdapterError: the model is not adapted, there is no such adapter, or several are active.
        ExportError: the program is missing or of another form; the adapter's targets, rank or
            projections are not the program's; ExecuTorch is not installed; or the file cannot be
            written. A file that was there is untouched.
    """
    target = with_suffix(path, ".ptd", "ExecuTorch's data files")
    _require()
    manifest = _manifest_at(Path(program))
    blob = _flat_tensors(program_vectors(model, adapter_name, manifest))
    with _written("data", target) as aside, (aside / target.name).open("wb") as file:
        blob.write_to_file(file)
    return target


def _manifest_at(program: Path) -> dict[str, Any]:
    from executorch.runtime import Runtime

    if not program.is_file():
        raise ExportError(f"there is no program at {program}")
    # The program's constants are not needed to ask it for its manifest.
    manifest = manifest_of(Runtime.get().load_program(program))
    if manifest.get("form") != "constant":
        raise ExportError(
            f"{program} takes no data file: its form is {manifest.get('form', 'unknown')!r}, "
            'not "constant"'
        )
    return manifest


@contextlib.contextmanager
def _written(what: str, target: Path) -> Iterator[Path]:
    try:
        with moved_into(target.parent) as aside:
            yield aside
    except OSError as error:
        raise ExportError(f"the {what} could not be written to {target}: {error}") from error


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
