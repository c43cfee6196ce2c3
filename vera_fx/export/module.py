"""Turns an adapted graph into a module that owns its tensors, and exports that module.

Graphs inside the library read the live model and the bank's slots. One that leaves it must not: it
gets a snapshot of every tensor, under names that a reader of the program can make sense of.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.traceback import preserve_node_meta

from vera_fx._torch import tree_flatten, tree_map
from vera_fx.capturing.export_call import Capture
from vera_fx.capturing.plain_output import plain_result
from vera_fx.errors import ExportError, first_line
from vera_fx.passes import InsertBranches, resolve, tag_of

AUTO = "auto"
VECTORS = "vectors"
INDEX = "adapter_index"
"""The argument that says for each row which entry of the stacked vectors it takes."""


@dataclass(frozen=True, slots=True)
class Read:
    """One tensor that a graph reads.

    Attributes:
        name: what to call it outside; a dotted path, or the key of an input.
        value: its value; the program gets a copy.
        is_input: make it an input of the program in place of a constant.
    """

    name: str
    value: Tensor
    is_input: bool = False


class ProgramModule(nn.Module):
    """What torch.export traces: the call's arguments by name in, plain containers out.

    Attributes:
        stacked: the vectors come as one entry per adapter, however many.
    """

    stacked = False

    def __init__(self, graph: Graph, capture: Capture, vectors: Sequence[str]) -> None:
        super().__init__()
        self._graph, self._capture, self._vectors = graph, capture, tuple(vectors)

    def run(self, given: Mapping[str, Any]) -> Any:
        """Run the graph for the arguments; ``given`` may be fake tensors of any admitted size."""
        arguments = dict(given)
        vectors = arguments.pop(VECTORS) if self._vectors else {}
        leaves = [x for x in tree_flatten(arguments)[0] if isinstance(x, Tensor)]
        # What tracing the model found out about sizes is put to the new trace, which notes it.
        if not self._capture.guards.admit(leaves):
            raise ExportError(
                "the model as it was traced for the example call does not admit these sizes"
            )
        values = [*leaves, *(vectors[key] for key in self._vectors)]
        with preserve_node_meta():
            outputs = fx.Interpreter(self, graph=self._graph).run(*values)
        return plain_result(outputs, self._capture.out_spec)


def own(
    graph: GraphModule,
    reads: Mapping[str, Read],
    capture: Capture,
    kind: type[ProgramModule] = ProgramModule,
) -> tuple[ProgramModule, dict[str, Tensor]]:
    """A module that runs a copy of ``graph`` and owns what it reads.

    Args:
        graph: a graph over a live model.
        reads: by attribute path, what to put in the place of the attribute; attributes that are not
            named here keep their path and value.
        capture: the call that the graph is of.
        kind: the class of the module; of one that takes stacked vectors the graph has their inputs.

    Returns:
        The module, and the tensors that it takes as inputs beside the call's, by their name.
    """
    copy = Graph()
    copy.output(copy.graph_copy(graph.graph, {}))
    inputs = {read.name: read.value.detach().clone() for read in reads.values() if read.is_input}
    if not kind.stacked:
        _make_inputs(copy, {path: read for path, read in reads.items() if read.is_input})
    program, copies = kind(copy, capture, list(inputs)), dict[int, Tensor]()
    for node in list(copy.nodes):
        if node.op == "get_attr" and not node.users:
            copy.erase_node(node)
        elif node.op == "get_attr":
            read = reads.get(node.target)
            value = resolve(graph, node.target) if read is None else read.value
            node.target = node.target if read is None else read.name
            _put(program, node.target, _snapshot(value, copies))
        elif (tag := tag_of(node)) is not None and tag.made_by == InsertBranches.__name__:
            _move_out(node)
    return program, inputs


def _move_out(node: Node) -> None:
    """Say that a branch is computed beside its target, by the target's parent.

    Readers of programs take every product in a linear module for the module's own: backends of
    ExecuTorch and quantisers look for them by this path, as our search for sites does.
    """
    stack = dict(node.meta.get("nn_module_stack") or {})
    if stack:
        stack.popitem()
        node.meta["nn_module_stack"] = stack


def _make_inputs(graph: Graph, reads: Mapping[str, Read]) -> None:
    """Add an input for each read, used by the graph or not."""
    place = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for index, path in enumerate(reads):
        with graph.inserting_after(place):
            place = graph.placeholder(f"vector_{index}")
        for old in [n for n in graph.nodes if n.op == "get_attr" and n.target == path]:
            _substitute(graph, old, place)


def _substitute(graph: Graph, old: Node, new: Node) -> None:
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _snapshot(value: Any, copies: dict[int, Tensor]) -> Any:
    """A frozen copy; tensors that are one stay one (tied weights)."""
    if not isinstance(value, Tensor):
        return value
    if id(value) not in copies:
        copies[id(value)] = value.detach().clone()
    return copies[id(value)]


def _put(root: nn.Module, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for segment in parents:
        # Through _modules: add_module refuses segments such as "type" that nn.Module defines.
        root = cast("nn.Module", root._modules.setdefault(segment, nn.Module()))
    if isinstance(value, Tensor):
        root._buffers[name] = value
    else:
        setattr(root, name, value)


def export_module(
    program: ProgramModule, arguments: Mapping[str, Any], count: int, dynamic_shapes: Any
) -> ExportedProgram:
    """Export the program of an example call.

    Args:
        program: what `own` made.
        arguments: the example call's arguments by name, those that hold tensors.
        count: how many of them are given by position.
        dynamic_shapes: `AUTO`, None, or torch.export's specification by argument name.

    Raises:
        ExportError: torch.export refuses the sizes or the graph.
    """
    shapes = _shapes(program, arguments, dynamic_shapes)
    names = list(arguments)
    args = tuple(arguments[name] for name in names[:count])
    kwargs = {name: arguments[name] for name in names[count:]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                _with_signature(program, names),
                args,
                kwargs,
                dynamic_shapes=shapes,
                strict=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch.export refuses this program: {first_line(error)}\n"
            f'  asked for dynamic_shapes={dynamic_shapes!r}; dynamic_shapes="auto" leaves open what '
            "the model allows, None fixes every size to the example's"
        ) from error


def _shapes(program: ProgramModule, arguments: Mapping[str, Any], asked: Any) -> Any:
    """torch.export's specification for every argument."""
    shapes = {name: _auto(value) for name, value in arguments.items()}
    given = shapes if asked == AUTO else dict.fromkeys(arguments) | dict(asked or {})
    if program.stacked:
        # How many adapters there are stays open; the index has as many rows as the call.
        number = given[VECTORS] if isinstance(given[VECTORS], Dim) else Dim.AUTO
        given[VECTORS] = {key: {0: number} for key in arguments[VECTORS]}
        given[INDEX] = shapes[INDEX] if asked is not None else None
    elif VECTORS in arguments:
        given[VECTORS] = dict.fromkeys(arguments[VECTORS])
    return given


def _auto(value: Any) -> Any:
    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return {dim: Dim.AUTO for dim, size in enumerate(leaf.shape) if size > 1}

    return tree_map(dims, value)


def _with_signature(program: ProgramModule, names: Sequence[str]) -> ProgramModule:
    """The program with a forward that names exactly the arguments of the example call."""

    def forward(self: ProgramModule, *args: Any, **kwargs: Any) -> Any:
        return self.run({**dict(zip(names, args, strict=False)), **kwargs})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    program.__class__ = type("ProgramModule", (type(program),), {"forward": forward})
    return program
