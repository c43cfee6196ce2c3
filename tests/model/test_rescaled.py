"""A forward that writes to its own weights between modes, as RWKV's does: once, and not by a graph."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import adapted_by_peft, assert_close, fill_vectors

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


class Rescaled(nn.Module):
    """Halves a weight for inference, and doubles the result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 5, bias=False)
        self.halved = False

    def forward(self, x: Tensor) -> Tensor:
        if self.halved is self.training:
            with torch.no_grad():
                self.down.weight.mul_(2.0 if self.training else 0.5)
            self.halved = not self.training
        y = self.down(self.up(x).tanh())
        return y if self.training else y * 2


def test_modes_follow_each_other_as_with_peft() -> None:
    torch.manual_seed(0)
    base = Rescaled()
    fields = {"r": 3, "target_modules": ["up", "down"]}
    theirs = adapted_by_peft(copy.deepcopy(base), **fields)
    ours = vera_fx.adapt(base, vera_fx.VeraConfig(**fields))
    fill_vectors(theirs)
    fill_vectors(ours)
    weight = ours.down.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vera_fx.PartialCaptureWarning)
        for training in (True, False, False, True, False):
            found, expected = ours.train(training)(X), theirs.train(training)(X)
            assert_close(found, expected, factor=5)
            assert torch.equal(ours.down.weight, weight if training else weight / 2)
    assert len(list(ours.__dict__["_vera_runtime"].all_captures())) >= 2


def test_the_call_that_writes_says_so() -> None:
    model = vera_fx.adapt(Rescaled(), vera_fx.VeraConfig(r=3, target_modules=["up"])).eval()
    with pytest.warns(vera_fx.PartialCaptureWarning, match="writes to 'down.weight'"):
        model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)


def test_embeddings_with_a_largest_norm_stay_in_the_graph() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(9, 6, max_norm=0.5), nn.Linear(6, 5)).eval()
    model = vera_fx.adapt(copy.deepcopy(plain), vera_fx.VeraConfig(r=3, target_modules=["1"]))
    ids = torch.tensor([[1, 2], [3, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(model(ids), plain(ids), factor=5)
    assert torch.equal(model[0].weight, plain[0].weight)
