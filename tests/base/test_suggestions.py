"""A model of an unknown architecture is told what it could target: what repeats from block to block."""

import pytest
from torch import nn

import vera_fx


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        self.wv = nn.Linear(4, 6)


class Unknown(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(4, 3)


def test_what_repeats_comes_first() -> None:
    expected = "those that repeat from block to block: 'wq', '0', '1', 'wv'; or from all of"
    with pytest.raises(vera_fx.TargetError, match=expected):
        vera_fx.adapt(Unknown(3), vera_fx.VeraConfig(r=2))


def test_one_block_repeats_nothing() -> None:
    with pytest.raises(vera_fx.TargetError) as caught:
        vera_fx.adapt(Unknown(1), vera_fx.VeraConfig(r=2))
    assert "repeat" not in str(caught.value)
    assert "this model's linear modules: '0', '1', 'out', 'wq', 'wv'" in str(caught.value)
