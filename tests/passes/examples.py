"""For every pass: a small module, and the pass that its docstring's graphs show."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from vera_fx.branches.vera.kind import VERA
from vera_fx.capturing.export_call import bind_live
from vera_fx.passes import (
    Branch,
    CheckpointLayers,
    ContiguousAttention,
    DenseProducts,
    DropIdleDropout,
    DropMetadataAsserts,
    FoldWeights,
    GraphPass,
    InlineGradMode,
    InsertBranches,
    LowerBranch,
    MergeWeight,
    OutlineLayers,
    ReadWeight,
    RecomputeInBackward,
    Redirect,
    RedirectParameters,
    RowSource,
    RowVectors,
    ScaleBranch,
    ShareProjection,
    Target,
    ZeroMaskedRows,
    run_passes,
)


def graph_of(module: nn.Module, *inputs: Tensor) -> GraphModule:
    """Export with every dimension above 1 dynamic, bound to ``module``."""
    shapes = tuple({d: Dim.AUTO for d, size in enumerate(x.shape) if size > 1} for x in inputs)
    exported = torch.export.export(
        module, inputs, strict=False, dynamic_shapes=(shapes,) if len(inputs) > 1 else shapes
    )
    bound = bind_live(exported, module)
    bound.recompile()
    return bound


class Holder(nn.Module):
    """Tensors that graphs can read but that are no parameters of the module, like a bank's slot."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        self.__dict__.update(tensors)


class RotaryLike(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            angle = x.cos()
        return x + angle


class Idle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.cos(), 0.5, training=False).sin()


class Casts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64)


class OneLinear(nn.Module):
    def __init__(self, *, half: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 5, dtype=torch.bfloat16 if half else torch.float32)
        self.slot = Holder(
            vera_A=torch.randn(2, 4),
            vera_B=torch.randn(7, 2),
            lambda_d=nn.Parameter(torch.randn(2)),
            lambda_b=nn.Parameter(torch.randn(5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


class Activated(OneLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(nn.functional.silu(x))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 5, bias=False)
        self.value = nn.Linear(3, 5, bias=False)
        self.slot = Holder(
            vera_A=torch.randn(2, 3),
            vera_B=torch.randn(5, 2),
            query_d=nn.Parameter(torch.randn(2)),
            query_b=nn.Parameter(torch.randn(5)),
            value_d=nn.Parameter(torch.randn(2)),
            value_b=nn.Parameter(torch.randn(5)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(x), self.value(x)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5, bias=False)
        self.slot = Holder(head_weight=nn.Parameter(torch.randn(5, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.folded = Holder(head=torch.randn(5, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(x), self.head(x)


class Packed(nn.Module):
    """A layer whose weight only its own code reads."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 3, 5

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.arange(15.0).view(3, 5)


class CallsModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lin = nn.Linear(3, 3, bias=False), Packed()
        self.dense = Holder(weight=torch.randn(5, 3), bias=torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.vera_fx.call(self.first(x), "lin", 5, torch.float32)


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = x[None, None]
        return nn.functional.scaled_dot_product_attention(rows, rows, rows)


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = x[None, None]
        return nn.functional.scaled_dot_product_attention(rows, rows, rows, x @ x.T > 3)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Sine(), Sine()])

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        for layer in self.layers:
            x = layer(x)
        return x


def vera(d: str, b: str, dropout: float = 0.0) -> Branch:
    """VeRA's branch with vectors that the slot calls ``d`` and ``b``."""
    names = {"vera_A": "vera_A", "vera_B": "vera_B", "vera_lambda_d": d, "vera_lambda_b": b}
    return Branch(VERA.graph, {name: f"slot.{at}" for name, at in names.items()}, dropout)


def one_target() -> InsertBranches:
    return InsertBranches(
        (Target("lin", 3, 5, ReadWeight(), ("lin.weight",)),),
        ((vera("lambda_d", "lambda_b"),),),
    )


def two_targets(dropout: float = 0.0) -> InsertBranches:
    return InsertBranches(
        tuple(Target(n, 3, 5, ReadWeight(), (f"{n}.weight",)) for n in ("query", "value")),
        tuple((vera(f"{n}_d", f"{n}_b", dropout),) for n in ("query", "value")),
    )


def half_linear() -> GraphModule:
    graph = graph_of(OneLinear(half=True), torch.randn(4, 3, dtype=torch.bfloat16))
    run_passes(graph, (one_target(),))
    return graph


def adapted_linear() -> GraphModule:
    graph = graph_of(OneLinear(), torch.randn(4, 3))
    run_passes(graph, (one_target(),))
    return graph


def merged_linear() -> GraphModule:
    graph = graph_of(Activated(), torch.randn(4, 3))
    dense = MergeWeight(through_x=frozenset({"lin"}))
    run_passes(graph, (one_target(), dense))
    return graph


def adapted_readers() -> GraphModule:
    graph = graph_of(TwoReaders(), torch.randn(4, 3))
    run_passes(graph, (two_targets(),))
    return graph


@dataclass(frozen=True)
class Example:
    """A pass and a graph it has work on."""

    graph_pass: GraphPass
    build: Callable[[], GraphModule]


EXAMPLES: dict[str, Example] = {
    "InlineGradMode": Example(InlineGradMode(), lambda: graph_of(RotaryLike(), torch.randn(4, 3))),
    "CheckpointLayers": Example(CheckpointLayers(frozenset({"lin"})), adapted_linear),
    "DropMetadataAsserts": Example(
        DropMetadataAsserts(), lambda: graph_of(Casts(), torch.randn(4, 3))
    ),
    "DropIdleDropout": Example(DropIdleDropout(), lambda: graph_of(Idle(), torch.randn(4, 3))),
    "DenseProducts": Example(
        DenseProducts((("lin", "dense.weight", "dense.bias"),)),
        lambda: graph_of(CallsModule(), torch.randn(4, 3)),
    ),
    "FoldWeights": Example(
        FoldWeights(
            (Target("head", 3, 5, ReadWeight(), ("embed.weight", "head.weight")),), ("folded.head",)
        ),
        lambda: graph_of(TiedHead(), torch.randn(4, 3)),
    ),
    "RedirectParameters": Example(
        RedirectParameters((Redirect("head", ("head.weight",), "slot.head_weight"),)),
        lambda: graph_of(Head(), torch.randn(4, 3)),
    ),
    "ContiguousAttention": Example(
        ContiguousAttention(), lambda: graph_of(Attends(), torch.randn(4, 3))
    ),
    "InsertBranches": Example(one_target(), lambda: graph_of(OneLinear(), torch.randn(4, 3))),
    "RowVectors": Example(
        RowVectors(
            (
                RowSource("slot.lambda_d", "rows", 0, (2,)),
                RowSource("slot.lambda_b", "rows", 2, (5,)),
            ),
            frozenset({0}),
            (("rows", (7,), torch.float32),),
        ),
        adapted_linear,
    ),
    "LowerBranch": Example(LowerBranch(), half_linear),
    "MergeWeight": Example(MergeWeight(through_z=frozenset({"lin"})), adapted_linear),
    "RecomputeInBackward": Example(RecomputeInBackward(frozenset({"lin"})), merged_linear),
    "OutlineLayers": Example(OutlineLayers(2), lambda: graph_of(Stack(), torch.randn(4, 3))),
    "ScaleBranch": Example(ScaleBranch(frozenset({"lin"})), adapted_linear),
    "ShareProjection": Example(ShareProjection(), adapted_readers),
    "ZeroMaskedRows": Example(ZeroMaskedRows(), lambda: graph_of(Masked(), torch.randn(4, 3))),
}
