"""What stands in a shell for modules that graphs call: no tensors to trace, and a call of one node."""

import warnings
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from vera_fx._context import holding, now
from vera_fx._torch import outside_modes
from vera_fx.base.modules import HOOKS, original_class
from vera_fx.errors import CaptureError
from vera_fx.passes import call_module, written_between
from vera_fx.products.kinds import BaseCalls, Call, base_calls, cut_of, stands_for
from vera_fx.products.opaque import answer, features_of, tensors_of

_ANSWERS = "dtypes of answers"


@torch.library.custom_op("vera_fx::call", mutates_args=())
def _call(x: Tensor, path: str, out_features: int, dtype: torch.dtype) -> Tensor:
    """The call of the module at ``path``, in traces; never runs."""
    del x, out_features, dtype
    raise CaptureError(f"the stand-in for {path!r} was called outside of a capture")


@_call.register_fake
def _(x: Tensor, path: str, out_features: int, dtype: torch.dtype) -> Tensor:
    del path
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


_call.register_autograd(lambda _ctx, _grad: (None, None, None, None))


def stand_in(module: nn.Module, path: str) -> nn.Module:
    """A module of the same class and attributes as ``module``, whose call is one operator."""
    if isinstance(module, nn.Embedding):
        return _twin(module, _embedding(path, module.embedding_dim, module.weight.dtype))
    cut, features = cut_of(module), features_of(module)
    if features is None:
        raise CaptureError(f"{path!r} is a {type(module).__name__} that says no features")
    width = cut.size if cut is not None and cut.of == "out" else features[1]

    def forward(_: nn.Module, x: Tensor, *others: Any, **options: Any) -> Tensor:
        if others or options:
            raise CaptureError(
                f"{path!r}, a {type(module).__name__}, is called with more than one tensor; exclude "
                "what calls it from the model's graph"
            )
        dtype = _answered(module, x) if cut is None else _computed(x)
        return torch.ops.vera_fx.call(x, path, width, dtype)

    return _twin(module, forward)


def _embedding(path: str, width: int, dtype: torch.dtype) -> Any:
    def forward(_: nn.Module, ids: Tensor) -> Tensor:
        # The operator's inputs have a dimension that the output's width takes the place of.
        return torch.ops.vera_fx.call(ids.unsqueeze(-1), path, width, dtype)

    return forward


def _twin(module: nn.Module, forward: Any) -> nn.Module:
    """A module without tensors of the class and attributes of ``module``, with another forward."""
    base = original_class(module)
    twin = object.__new__(type(base.__name__, (base,), {"forward": forward}))
    held = {**module._parameters, **module._buffers}
    twin.__dict__.update({k: v for k, v in module.__dict__.items() if k != "forward"} | held)
    twin.__dict__["_parameters"], twin.__dict__["_buffers"] = {}, {}
    twin.__dict__.update({name: type(module.__dict__[name])() for name in HOOKS})
    return twin


def _computed(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's output for such an input."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _answered(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype that the module returns for such an input: asked of itself, once for its class."""
    own = next(tensors_of(module), None)
    if own is None or own.is_meta:
        return x.dtype
    device = own.device.type
    key = type(module), x.dtype, own.dtype, torch.is_autocast_enabled(device)
    known = cast("Answers", now(_ANSWERS) or Answers())
    if key not in known.dtypes:
        result = answer(module, torch.ones(1, x.shape[-1], dtype=x.dtype, device=own.device))
        known.dtypes[key] = result.dtype
        if not result.requires_grad:
            known.blocking.add(_made(module))
    return known.dtypes[key]


def _made(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    with outside_modes():  # a tensor that is looked at in a trace is a constant of the graph
        held = "" if weight is None else f" over {type(weight.data).__name__}"
    return f"{type(module).__name__}{held}"


@dataclass(slots=True)
class Answers:
    """What modules have answered during a trace.

    Attributes:
        dtypes: by class and input.
        blocking: classes that pass no gradient on to their input.
    """

    dtypes: dict[Any, torch.dtype] = field(default_factory=dict[Any, torch.dtype])
    blocking: set[str] = field(default_factory=set[str])

    def tell(self) -> None:
        """Warn of those that pass no gradient on, after the trace, which silences warnings."""
        for name in sorted(self.blocking):
            warnings.warn(
                f"{name} passes no gradient on to its input: adapters in layers before it do not learn "
                "from what comes after it, in PEFT as here",
                stacklevel=2,
            )


def asking(answers: Answers) -> Any:
    """Inside the block each class of modules is asked once, and the answers noted."""
    return holding(_ANSWERS, answers)


def call_live(graph: Graph, model: nn.Module) -> None:
    """Let a captured graph call the modules that stand-ins were traced for, or compute with them."""
    operator = torch.ops.vera_fx.call.default
    inputs: dict[Any, Node] = {}
    for node in graph.find_nodes(op="call_function", target=operator):
        x, path, *_ = node.args
        module = model.get_submodule(str(path))
        calls = base_calls(module) if stands_for(module) else BaseCalls((call_module, ()))
        with graph.inserting_before(node):
            x = _prepared(graph, calls, node, inputs)
            holder = graph.create_node("get_attr", str(path))
            last = _called(graph, calls.call, (holder, x), node)
            if calls.after is not None:
                last = _called(graph, calls.after, (holder, last), node)
        node.replace_all_uses_with(last)
        graph.erase_node(node)


def _called(graph: Graph, call: Call, args: tuple[Any, ...], like: Node) -> Node:
    function, more = call
    called = graph.call_function(function, (*args, *more))
    called.meta.update(like.meta)
    return called


def _prepared(graph: Graph, calls: BaseCalls, node: Node, known: dict[Any, Node]) -> Node:
    """The input as the call takes it; once for all calls that read it, so that gradients add up first."""
    x = cast("Node", node.args[0])
    if calls.before is None:
        return x
    key = (x, calls.before)
    if key not in known or written_between(known[key], node):
        known[key] = _called(graph, calls.before, (x,), node)
        known[key].meta["val"] = x.meta["val"]
    return known[key]
