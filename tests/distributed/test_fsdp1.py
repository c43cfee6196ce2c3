"""FSDP1 is refused: it runs on CPUs, and an adapted model in it is told to use FSDP2."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.training import Layer, adapted, base, batches, config, mean_loss, mine
from tests.helpers import assert_close

X = batches(1)[0]
POLICIES = {"root": None, "layers and root": ModuleWrapPolicy({Layer})}


def flat(model: nn.Module, policy: str) -> Any:
    return FullyShardedDataParallel(
        model, auto_wrap_policy=POLICIES[policy], use_orig_params=True,
        device_id=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@two_processes
def test_it_is_refused(policy: str) -> None:
    called = adapted()
    called(X)  # a graph from before is none for what FSDP1 makes of the model
    for model in (called, adapted()):
        with pytest.raises(
            vera_fx.AdapterError, match=r"FullyShardedDataParallel .* by fully_shard"
        ):
            flat(model, policy)(mine(X))
    with pytest.raises(vera_fx.AdapterError, match=r"FullyShardedDataParallel .* by fully_shard"):
        vera_fx.adapt(flat(base(), policy), config())(mine(X))


@two_processes
def test_the_base_runs_there_and_other_models_are_let_be() -> None:
    wrapped, alone = flat(base().requires_grad_(requires_grad=False), "root"), base()
    x = mine(X).requires_grad_()
    mean_loss(wrapped(x)).backward()
    assert_close(wrapped(x), alone(x))
    inside = Calls(adapted())
    assert_close(flat(inside, "root")(x), inside.other[0](x))


class Calls(nn.Module):
    """FSDP1 wraps this one; the adapted model that it calls is none of its modules."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(6, 6), [other]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other[0](x) + 0 * self.own(x).sum()
