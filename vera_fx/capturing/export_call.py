"""Captures one signature of a model as a graph that reads the live parameters.

`torch.export` (non-strict) runs the original forward once on fake tensors. The exported graph is
then bound to the model itself: it shares the model's dictionaries of modules, parameters and
buffers, so that whatever is assigned, moved or loaded there later is what the graph reads.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.graph import CodeGen

from vera_fx._context import capturing
from vera_fx._torch import TreeSpec
from vera_fx.base.hf import capture_hint, checkpointing_recorded, export_patches
from vera_fx.base.modules import BANK
from vera_fx.capturing.open_integers import sizes_as_integers
from vera_fx.capturing.returned_objects import Stateful, mark_returned
from vera_fx.capturing.signature import Call, CallReader, map_tensors
from vera_fx.errors import CaptureError, first_line
from vera_fx.passes import PipelineReport, cleanup, resolve
from vera_fx.pipelines import run_pipeline


@dataclass(slots=True)
class Capture:
    """One signature as a graph.

    Attributes:
        graph: the captured graph after cleanup, reading the live model; flat tensors in and out.
        out_spec: the tree of its outputs.
        report: what the cleanup passes did.
        training: for each module path, whether it was in train mode.
        inputs: the argument that each input tensor came from.
        stateful: names of the arguments whose new state is among the outputs.
        guards: which sizes the graph admits.
        values: its inputs as fake tensors, whose sizes may be symbols.
        checkpointed: paths of the layers whose activations are to be recomputed in backward.
        variants: adapted graphs made from it, by the bank's structure and the plans.
        planners: what chooses the plans, by the bank's structure.
    """

    graph: GraphModule
    out_spec: TreeSpec
    report: PipelineReport
    training: dict[str, bool]
    inputs: tuple[str, ...]
    stateful: tuple[str, ...]
    guards: "Guards"
    values: list[Tensor]
    checkpointed: frozenset[str] = frozenset()
    variants: dict[Any, dict[Any, Any]] = field(default_factory=dict[Any, dict[Any, Any]])
    planners: dict[Any, Any] = field(default_factory=dict[Any, Any])


class Guards:
    """What sizes a captured graph admits: fixed ones, and relations found while tracing."""

    def __init__(self, values: list[Tensor]) -> None:
        # A size that tracing has fixed may still be a SymInt, one that stands for a constant.
        self._fixed = [
            (index, dim, int(size))
            for index, value in enumerate(values)
            for dim, size in enumerate(value.shape)
            if is_concrete_int(size)
        ]
        symbols = [s for v in values for s in v.shape if isinstance(s, torch.SymInt)]
        self._env = symbols[0].node.shape_env if symbols else None
        self._code = self._env.produce_guards_expression(values) if self._env is not None else None

    def admit(self, leaves: list[Tensor]) -> bool:
        """True if the graph is valid for inputs of these sizes."""
        if any(leaves[index].shape[dim] != size for index, dim, size in self._fixed):
            return False
        if self._env is None or self._code is None:
            return True
        return bool(self._env.evaluate_guards_expression(self._code, leaves))


def capture_call(model: nn.Module, forward: Any, reader: CallReader, call: Call) -> Capture:
    """Export the call and bind the graph to ``model``.

    Args:
        model: the live model.
        forward: the original, unbound forward of the model's class.
        reader: the reader that took ``call`` apart.
        call: the call to capture; its tensors are copied, never written to.

    Raises:
        CaptureError: torch.export cannot trace the call.
    """
    stateful = Stateful.of(call.arguments)
    with checkpointing_recorded(model) as checkpointed:
        exported = _export(model, forward, reader, call, stateful)
    graph = bind_live(exported, model)
    report = run_pipeline(graph, cleanup(), "capture")
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return Capture(
        graph=graph,
        out_spec=cast("TreeSpec", exported.call_spec.out_spec),
        report=report,
        training={path: module.training for path, module in model.named_modules()},
        inputs=call.tensor_names(),
        stateful=stateful.names,
        guards=Guards(values),
        values=values,
        checkpointed=frozenset(checkpointed),
    )


def _export(
    model: nn.Module, forward: Any, reader: CallReader, call: Call, stateful: Stateful
) -> ExportedProgram:
    copies = {name: map_tensors(value, _copy) for name, value in call.inputs.items()}
    inputs = {
        f"input_{i}": copies[name] for i, name in enumerate(copies) if _has_tensor(copies[name])
    }
    names = dict(zip(inputs, (n for n in copies if _has_tensor(copies[n])), strict=True))

    def run(shell: nn.Module, **given: Any) -> Any:
        arguments = {**copies, **{names[key]: value for key, value in given.items()}}
        for value in arguments.values():
            sizes_as_integers(value)
        args, kwargs = reader.split(arguments)
        try:
            result = forward(shell, *args, **kwargs)
        except Exception as error:
            raise _Stopped from error
        return mark_returned(result, stateful.pick(arguments))

    shell = _shell(model, run, list(inputs))
    try:
        with _tracing(model):
            return torch.export.export(
                shell, (), inputs, strict=False, dynamic_shapes=cast("Any", _dynamic_shapes(inputs))
            )
    except Exception as error:
        reason = error.__cause__ if isinstance(error, _Stopped) and error.__cause__ else error
        raise CaptureError(_explain(model, call, reason)) from reason


class _Stopped(Exception):  # noqa: N818
    """The model's forward raised; torch would print half a graph for some errors of its own."""


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _has_tensor(value: Any) -> bool:
    found: list[Tensor] = []
    map_tensors(value, lambda x: found.append(x) or x)
    return bool(found)


def _shell(model: nn.Module, run: Any, names: list[str]) -> nn.Module:
    """A stand-in for ``model``: the same state and class, but a flat forward and no bank.

    torch.export reads the forward's signature, and would turn Hugging Face's ``**kwargs`` into one
    bundle that no dynamic shape can be given for. The model itself is left alone.
    """
    base = original_class(model)

    def forward(self: nn.Module, **given: Any) -> Any:
        return run(self, **given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter("self", kind),
        *(inspect.Parameter(name, kind) for name in names),
    ]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    shell = object.__new__(type(base.__name__, (base,), {"forward": forward}))
    # Wrappers on the object (accelerate's forward, nn.Module.compile) are for real calls.
    wrappers = ("forward", "_compiled_call_impl")
    shell.__dict__.update({k: v for k, v in model.__dict__.items() if k not in wrappers})
    shell.__dict__["_modules"] = {k: m for k, m in model._modules.items() if k != BANK}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        shell.__dict__[hooks] = type(model.__dict__[hooks])()
    return shell


def original_class(model: nn.Module) -> type[nn.Module]:
    """The class that the model had before it was adapted."""
    return getattr(type(model), "_vera_base", type(model))


def _dynamic_shapes(inputs: dict[str, Any]) -> ShapesCollection | None:
    shapes = ShapesCollection()
    some = False

    def mark(value: Tensor) -> Tensor:
        nonlocal some
        dims = {dim: Dim.AUTO for dim, size in enumerate(value.shape) if size > 1}
        if dims:
            shapes[value] = dims
            some = True
        return value

    for value in inputs.values():
        map_tensors(value, mark)
    return shapes if some else None


@contextlib.contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    """The surroundings of an export: gradients on, no fast paths, no traces left behind."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused fast path of nn.TransformerEncoderLayer hides its linear calls.
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            capturing(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            export_patches(model),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def bind_live(exported: ExportedProgram, model: nn.Module) -> GraphModule:
    """The exported graph as a module that reads ``model`` itself.

    The result shares the model's dictionaries of modules, parameters and buffers. Constants that
    the export lifted out of the code become attributes of its own.
    """
    source = exported.module(check_guards=False)
    graph = cast("Graph", source.graph)
    graph.set_codegen(CodeGen())
    _drop_constant_inputs(graph)
    live = {*exported.graph_signature.parameters, *exported.graph_signature.buffers}
    bound = GraphModule(nn.Module(), Graph())
    for name in ("_modules", "_parameters", "_buffers"):
        bound.__dict__[name] = model.__dict__[name]
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in live:
            value = resolve(source, node.target)
            node.target = f"_constant_{node.target.replace('.', '_')}"
            bound.__dict__[node.target] = value
    bound.graph = graph
    return bound


def _drop_constant_inputs(graph: Graph) -> None:
    """Remove inputs that are constants: they are part of the signature and baked in."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            node.replace_all_uses_with(node.meta.get("val"))
            graph.erase_node(node)


def _explain(model: nn.Module, call: Call, error: BaseException) -> str:
    shown = ", ".join(call.arguments) or "no arguments"
    hint = capture_hint(model, call.arguments)
    return (
        f"torch.export cannot capture {type(model).__name__}({shown}): "
        f"{first_line(error)}{' ' * bool(hint)}{hint}\n"
        "  Calls whose control flow depends on tensor values, or that use unregistered types, cannot "
        "become one graph. Call a part of the model that can, or change the arguments; the full "
        "reason is the exception above."
    )
