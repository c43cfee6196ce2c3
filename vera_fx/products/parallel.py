"""Linear layers under tensor parallelism: each process multiplies by its part of the weight.

Torch's styles (``parallelize_module``) put hooks on a module, transformers' (``tp_plan``) a forward on its
object. Both say how what goes in and comes out is cut; the weight's placement says how it is.
"""

from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

from torch import nn

from vera_fx._torch_parallel import closure_of, hook_parts, part_from
from vera_fx.passes import BaseProduct, Cut
from vera_fx.products.cut_linear import (
    BaseCalls,
    CutLinear,
    column_linear,
    joined_linear,
    row_linear,
    row_sum,
    rows_embedding,
    split_linear,
)
from vera_fx.products.linear import Linear
from vera_fx.products.protocol import plain_refusal

_STYLES = ("ColwiseParallel", "RowwiseParallel")
_IDLE = "ReplicatedWithGradAllReduce"


@dataclass(frozen=True, slots=True)
class Style:
    """What a module's parallel style does around its forward.

    Attributes:
        name: of its class.
        inputs: how the input is cut, a placement of ``torch.distributed.tensor``; None if it is not known.
        outputs: likewise the output.
        local: whether plain tensors come out.
    """

    name: str
    inputs: Any = None
    outputs: Any = None
    local: bool = True


def style_of(module: nn.Module) -> Style | None:
    """The parallel style of a module; None if it has none."""
    return _by_hooks(module) or _by_forward(module)


def _by_hooks(module: nn.Module) -> Style | None:
    before = [p for hook in module._forward_pre_hooks.values() if (p := hook_parts(hook))]
    after = [p for hook in module._forward_hooks.values() if (p := hook_parts(hook))]
    if not before and not after:
        return None
    try:
        into, out = before[0]["input_fn"], after[0]["output_fn"]
        names = {part.func.__qualname__.partition(".")[0] for part in (into, out)}
        (name,) = names
        return Style(name, into.args[0][0], out.args[0][0], bool(out.args[1]))
    except (IndexError, KeyError, AttributeError, TypeError, ValueError):
        return Style("another style")


def _by_forward(module: nn.Module) -> Style | None:
    forward = module.__dict__.get("forward")
    if not isinstance(forward, FunctionType) or not forward.__module__.startswith("transformers."):
        return None
    installer, installed, _ = forward.__qualname__.partition(".install_forward.")
    if not installed:
        return None
    style = closure_of(forward).get("self")
    if style is None:
        return Style(installer)
    own = type(style).__module__.startswith("transformers.")
    names = ("input_layouts", "output_layouts", "use_local_output")
    into, out, local = (getattr(style, name, None) for name in names)
    return Style(type(style).__name__ if own else "another style", into, out, local is not False)


def is_idle(module: nn.Module) -> bool:
    """True if a module's style does nothing while its parameters are frozen (norms of attention heads)."""
    style = _by_forward(module)
    return style is not None and style.name == _IDLE and not _trains(module)


def _trains(module: nn.Module) -> bool:
    return any(tensor.requires_grad for tensor in module.parameters(recurse=False))


def is_odd(module: nn.Module) -> bool:
    """True for a parallel module that no graph can take in, so that Python has to call it."""
    style = style_of(module)
    return style is not None and not is_idle(module) and not _is_known(module)


def _is_known(module: nn.Module) -> bool:
    if is_cut_embedding(module):
        return True
    return isinstance(module, nn.Linear) and not isinstance(_cut(module), str)


def is_cut_embedding(module: nn.Module) -> bool:
    """True for an embedding whose words are dealt out to processes, and that gives whole vectors."""
    style, weight = style_of(module), module._parameters.get("weight")
    if style is None or type(module) is not nn.Embedding or module.max_norm is not None:
        return False
    if not hasattr(weight, "placements") or cast("Any", weight).device_mesh.ndim != 1:
        return False
    layouts = _layout(style.inputs), _layout(style.outputs)
    is_whole = layouts == ("whole", "whole") or style.name == "EmbeddingParallel"
    by_rows = repr(cast("Any", weight).placements[0]) == "Shard(dim=0)"
    return is_whole and by_rows and style.local and not _trains(module)


def stands_for(module: nn.Module) -> bool:
    """True for a parallel module that graphs compute by functions of their own."""
    return cut_of(module) is not None or is_cut_embedding(module)


def cut_of(module: nn.Module) -> Cut | None:
    """How a linear layer is cut over processes; None if it is not."""
    # The weight first: hooks ask this wherever Python calls a layer, in traces of others as well.
    # A quantised layer may have none.
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not hasattr(weight, "placements"):
        return None
    found = _cut(module) if style_of(module) else None
    return None if isinstance(found, str) else found


def _cut(module: nn.Linear) -> Cut | str:
    """How it is cut, or why no branch can be computed beside it."""
    style, weight = style_of(module), module.weight
    if style is None or style.name not in _STYLES or not hasattr(weight, "placements"):
        name = "no style" if style is None else style.name
        return f"is under tensor parallelism by {name}, and only {' and '.join(_STYLES)} are known"
    mesh, placements = cast("Any", weight).device_mesh, cast("Any", weight).placements
    if mesh.ndim != 1:
        return (
            f"is cut over a mesh of {mesh.ndim} dimensions, and tensor parallelism alone is known"
        )
    of = {"Shard(dim=0)": "out", "Shard(dim=1)": "in"}.get(repr(placements[0]), "")
    if not style.local:
        return "gives DTensors (use_local_output=False); let it give plain tensors"
    return _seen(module, style, of) or (
        f"is under tensor parallelism by {style.name} with a weight cut by {placements[0]!r}, inputs "
        f"{style.inputs!r} and outputs {style.outputs!r}, and branches are made for whole inputs and "
        "columns of them (Replicate, Shard(-1)); use the style's defaults, or exclude it from target_modules"
    )


def _seen(module: nn.Linear, style: Style, of: str) -> Cut | None:
    """What of input and output a process has, by the style's layouts."""
    weight: Any = module.weight
    group, rank, world = _group(weight)
    whole = {"out": weight.shape[0], "in": weight.shape[1]}.get(of, 0)
    start, stop = _own(rank, world, whole)
    size = stop - start
    if not of or weight.to_local().shape[0 if of == "out" else 1] != size:
        return None
    into, out = _layout(style.inputs), _layout(style.outputs)
    if (into, out) == ("whole", "whole"):
        return Cut(group)
    known = {"out": ("whole", "columns"), "in": ("columns", "whole")}
    return Cut(group, of, start, size) if (into, out) == known[of] else None


def _layout(placement: Any) -> str:
    if placement is None:
        return ""
    if placement.is_replicate():
        return "whole"
    return "columns" if repr(placement) == "Shard(dim=-1)" else ""


def _group(weight: Any) -> tuple[str, int, int]:
    mesh = weight.device_mesh
    return mesh.get_group().group_name, mesh.get_local_rank(), mesh.size()


def base_calls(module: nn.Module) -> BaseCalls:
    """What graphs call for a module that `stands_for` knows."""
    weight, cut = cast("Any", module.weight), cut_of(module)
    group, rank, world = _group(weight)
    if cut is None:
        return BaseCalls((rows_embedding, (group, *_own(rank, world, weight.shape[0]))))
    by_columns = repr(weight.placements[0]) == "Shard(dim=0)"
    if cut.of:
        if by_columns:
            return BaseCalls((column_linear, ()), before=(part_from, (group,)))
        return BaseCalls((row_linear, ()), after=(row_sum, (group,)))
    if by_columns:
        return BaseCalls((joined_linear, (group, rank, world, weight.shape[0])))
    return BaseCalls((split_linear, (group, *_own(rank, world, weight.shape[1]))))


def _own(rank: int, world: int, whole: int) -> tuple[int, int]:
    """The entries that a process has of a dimension that ``DTensor`` cuts."""
    chunk = -(-whole // world)
    return min(rank * chunk, whole), min((rank + 1) * chunk, whole)


@dataclass(frozen=True, slots=True)
class Parallel(Linear):
    """Graphs compute with this process's part of the weight, and sum over processes where it is due.

    The weight, a ``DTensor``, has the sizes of the whole; every process merges its part.
    """

    @property
    def name(self) -> str:
        """As messages call it."""
        return "nn.Linear under tensor parallelism"

    def owns(self, module: nn.Module) -> bool:
        """``nn.Linear`` with a parallel style."""
        return isinstance(module, nn.Linear) and style_of(module) is not None

    def refusal(self, module: nn.Module) -> str | None:
        """Styles and layouts that branches are not made for."""
        reason = plain_refusal(module.weight)
        found = _cut(cast("nn.Linear", module)) if reason is None else reason
        return found if isinstance(found, str) else None

    def product(self, module: nn.Module) -> BaseProduct:
        """A call of a function."""
        del module
        return CutLinear()
