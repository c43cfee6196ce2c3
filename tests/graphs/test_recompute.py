"""What compiled training steps keep for backward."""

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_same_gradients, fill_vectors, gradients, kept_tensors, storage_of

R, ROWS = 3, 40


class Gated(nn.Module):
    """A norm before one target, a product of two before another, nothing cheap before the third."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(24), nn.Dropout(dropout)
        self.up, self.gate = nn.Linear(24, 36), nn.Linear(24, 36)
        self.down = nn.Linear(36, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.norm(x))
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def model(plan: str, targets: list[str] | None, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(Gated(dropout), Gated(dropout)).requires_grad_(False)
    if targets is None:
        return base
    config = vera_fx.VeraConfig(r=R, target_modules=targets, plan=plan)
    adapted = vera_fx.adapt(base, config)
    fill_vectors(adapted)
    return adapted


def kept(module: nn.Module, rows: int = ROWS) -> list[tuple[int, ...]]:
    """Shapes of what a compiled step keeps and the plain parameters are not."""
    own = {storage_of(t) for t in (*module.parameters(), *module.buffers())}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
    x = torch.randn(rows, 24, requires_grad=True)
    found = kept_tensors(lambda: compiled(x).square().sum())
    return sorted(tuple(t.shape) for t in found if storage_of(t) not in own)


def wide(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those with a row per token and more than the statistics of norms."""
    return [shape for shape in shapes if shape[0] == ROWS and shape[-1] > 1]


def test_inputs_of_dense_sites_are_not_kept(fresh_dynamo) -> None:
    floor = wide(kept(model("auto", None)))
    ours = wide(kept(model("dense", ["up", "gate", "down"])))
    assert ours == floor


def test_inputs_behind_dropout_are_kept(fresh_dynamo) -> None:
    floor = wide(kept(model("auto", None, dropout=0.1)))
    ours = wide(kept(model("dense", ["up"], dropout=0.1)))
    assert len(ours) == len(floor) + 2


def test_merged_weights_are_kept_for_few_tokens_only(fresh_dynamo) -> None:
    weights = {(36, 24), (24, 36)}
    few = kept(model("dense", ["up", "gate", "down"]), rows=8 * R - 1)
    assert len([shape for shape in few if shape in weights]) == 6
    many = kept(model("dense", ["up", "gate", "down"]))
    assert not weights & set(many)


@pytest.mark.parametrize("plan", ["merged", "dense"])
@pytest.mark.parametrize("rows", [2, 8 * R])
def test_gradients_are_the_eager_ones(plan: str, rows: int, fresh_dynamo) -> None:
    ours = model(plan, ["up", "down"])
    x = torch.randn(rows, 24)
    expected = gradients(model("factored", ["up", "down"]), lambda m: m(x))
    assert_same_gradients(gradients(ours, lambda m: m(x)), expected)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager_decomp_partition")
    assert_same_gradients(gradients(ours, lambda _: compiled(x)), expected)
