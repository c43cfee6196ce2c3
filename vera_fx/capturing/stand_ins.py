"""What stands in a shell for modules that graphs call: no tensors to trace, and a call of one node."""

import warnings
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph

from vera_fx._context import holding, now
from vera_fx._torch import outside_modes
from vera_fx.base.modules import original_class
from vera_fx.errors import CaptureError
from vera_fx.passes import call_module
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
    features = features_of(module)
    if features is None:
        raise CaptureError(f"{path!r} is a {type(module).__name__} that says no features")

    def forward(_: nn.Module, x: Tensor, *others: Any, **options: Any) -> Tensor:
        if others or options:
            raise CaptureError(
                f"{path!r}, a {type(module).__name__}, is called with more than one tensor; exclude "
                "what calls it from the model's graph"
            )
        return torch.ops.vera_fx.call(x, path, features[1], _answered(module, x))

    base = original_class(module)
    twin = object.__new__(type(base.__name__, (base,), {"forward": forward}))
    held = {**module._parameters, **module._buffers}
    twin.__dict__.update({k: v for k, v in module.__dict__.items() if k != "forward"} | held)
    twin.__dict__["_parameters"], twin.__dict__["_buffers"] = {}, {}
    return twin


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


def call_live(graph: Graph) -> None:
    """Let a captured graph call the modules that stand-ins were traced for."""
    operator = torch.ops.vera_fx.call.default
    for node in graph.find_nodes(op="call_function", target=operator):
        x, path, *_ = node.args
        with graph.inserting_before(node):
            module = graph.create_node("get_attr", str(path))
            called = graph.call_function(call_module, (module, x))
        called.meta.update(node.meta)
        node.replace_all_uses_with(called)
        graph.erase_node(node)
