"""Private corners of torch (2.11 to 2.15) around compiled graphs: what Dynamo and Inductor take for what."""

import inspect
import linecache
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, cast

import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.variables.builder import is_dynamic_source
from torch.fx import Graph, GraphModule, graph_module

from vera_fx._torch import skip_frame, start_compiling, stop_compiling

SOURCES = (graph_module, "_exec_with_source")
"""The function by which torch makes a function of a graph's printed code, and keeps that code for good."""

_PRINTED = "<eval_with_key>"


def wants_cuda_graphs() -> bool:
    """True if whatever Inductor compiles is to run as CUDA graphs, whichever mode is asked for."""
    config: Any = torch._inductor.config
    return bool(config.triton.cudagraphs)


class Unmarked(nn.Module):
    """A module whose tensors keep the marks of `ordinary_input`.

    Dynamo marks whatever the ``named_parameters`` and ``named_buffers`` of a module on its way give
    as staying where it is, unless the module has methods of its own.
    """

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As ``nn.Module`` has it."""
        return super().named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``nn.Module`` has it."""
        return super().named_buffers(*args, **kwargs)


def at_end_of(owner: object, function: Callable[..., None], *args: Any) -> None:
    """Call a function once ``owner`` is gone.

    In plain Python: Python may find that out in the midst of a compiled call, where Dynamo would compile
    ``weakref.finalize`` itself, with guards on every other one there is (minutes, gigabytes), and after
    eight times run nothing but what it has already compiled for what is called from there.
    """
    weakref.finalize(owner, _in_python, function, args).atexit = False


@skip_frame
def _in_python(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    compiler = stop_compiling()
    try:
        function(*args)
    finally:
        start_compiling(compiler)


skip_frame(weakref.finalize.__call__)


class LiveGraph(Unmarked, GraphModule):
    """A graph that reads the modules of a live model.

    Attributes:
        printed: whether its code is that of its graph.
    """

    printed = False

    def take(self, graph: Graph) -> None:
        """Own ``graph``, without printing its code yet, which takes longer than most passes."""
        self.printed, self._graph = False, graph
        graph.owning_module = self

    def recompile(self) -> Any:
        """Print the graph's code."""
        self.printed = True
        code = super().recompile()
        _source_ends_with(cast("Any", type(self)).forward)
        return code


def ending_sources(run: Callable[..., None], wanted: Callable[[], Any]) -> Callable[..., None]:
    """What to put in the place of `SOURCES`, so that torch keeps no code of graphs that are gone.

    It keeps it for tracebacks, in a dictionary and in ``linecache``, some kilobytes a capture.

    Args:
        run: what stands there.
        wanted: says whether the graphs that this thread makes now are meant.
    """

    def run_source(src: str, names: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        run(src, names, *args, **kwargs)
        if wanted():
            for made in names.values():
                _source_ends_with(made)

    return run_source


def _source_ends_with(function: Any) -> None:
    if isinstance(function, FunctionType) and function.__code__.co_filename.startswith(_PRINTED):
        at_end_of(function.__code__, _forget, function.__code__.co_filename)


def _forget(name: str) -> None:
    graph_module._loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


def copy_of(bound: GraphModule) -> LiveGraph:
    """A second graph over the same live model; not to run before a pipeline or `recompile`."""
    copy = LiveGraph(nn.Module(), Graph())
    copy.__dict__.update({k: v for k, v in bound.__dict__.items() if k != "_graph"})
    graph = Graph()
    output = graph.graph_copy(bound.graph, {}, return_output_node=True)
    value, old = cast("tuple[Any, Any]", output)
    graph.output(value).meta.update(old.meta)
    copy.take(graph)
    return copy


_ADDRESS = "_dynamo_static_input_type"


def ordinary_input(tensor: torch.Tensor) -> None:
    """Let compiled code take ``tensor`` as it takes the arguments of a call.

    CUDA graphs are recorded for the addresses of parameters and of modules' tensors, and once more for
    every other address. What is marked here is copied in with each replay instead. The mark is Dynamo's
    own, empty: there, but saying nothing.
    """
    setattr(tensor, _ADDRESS, "")


def stays_in_place(tensor: torch.Tensor) -> None:
    """Let CUDA graphs read and write ``tensor`` where it is, and rely on its address."""
    torch._dynamo.mark_static_address(tensor)


def in_place(tensor: torch.Tensor) -> bool:
    """Whether CUDA graphs rely on the address of ``tensor``, by its mark."""
    return bool(getattr(tensor, _ADDRESS, None))


def dynamic_source(pattern: str, dim: int) -> str:
    """The entry of ``torch.compiler.config.dynamic_sources`` that opens a dimension of what is read.

    Before torch 2.13 an entry opens all dimensions.
    """
    by_dim = "dim" in inspect.signature(is_dynamic_source).parameters
    return f"{pattern}:{dim}" if by_dim else pattern
