"""Parts of a sharded model: what a step looks at, what they share, and tensors used past their modules."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.test_fsdp2 import sharded
from tests.distributed.training import Layer, Net, adapted, batches, config, mine, train
from vera_fx.capturing.state_watch import StateWatch
from vera_fx.graphs.weight_watch import WeightWatch
from vera_fx.processes.reduced import Reduced
from vera_fx.report.sharing import SharedCapture

PATHS = tuple(f"layers.{n}" for n in range(3))


class Past(Layer):
    """Takes a way that depends on values, and uses a target's weight without its module."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return x + self.down(F.linear(x, self.up.weight, self.up.bias).tanh())


@two_processes
def test_equal_layers_share_one_capture() -> None:
    model = sharded(adapted())
    train(model, map(mine, batches()))
    assert vera_fx.explain(model).shared == (SharedCapture(PATHS),)


@two_processes
def test_equal_layers_share_one_compiled_function() -> None:
    torch._dynamo.reset()
    model = adapted()
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend="eager")
    train(sharded(model), map(mine, batches()))
    assert vera_fx.explain(model).shared == (SharedCapture(PATHS, functions=1),)


@two_processes
def test_a_step_looks_at_nothing_again() -> None:
    """No walk of the state, of hooks or of vectors for each layer, and no watch of every operator."""
    model = sharded(adapted())
    train(model, map(mine, batches()))
    calls: dict[str, int] = {}

    def counting(owner: type, name: str) -> Any:
        plain = getattr(owner, name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return plain(self, *args, **kwargs)

        return mock.patch.object(owner, name, counted)

    with (
        counting(StateWatch, "_look"), counting(StateWatch, "_look_for_hooks"),
        counting(StateWatch, "state"), counting(Reduced, "check"),
    ):  # fmt: skip
        train(model, map(mine, batches()))
    # A call of the model and of three layers, in three steps; who reduces is asked once a call.
    assert calls == {"state": 4 * 3, "check": 2 * 3}


@two_processes
def test_a_weight_that_is_used_past_its_module() -> None:
    net = Net()
    net.layers[1] = Past()
    model = sharded(vera_fx.adapt(net, config()))
    with (
        pytest.warns(vera_fx.PartialCaptureWarning, match="layers.1"),
        pytest.raises(vera_fx.TargetError, match="'layers.1.up' is adapted, and a forward"),
    ):
        model(batches(1)[0])


@two_processes
def test_nothing_is_watched_where_all_targets_are_sharded() -> None:
    model = sharded(adapted(target_modules=["up", "down"]))
    entered: list[WeightWatch] = []
    enter = WeightWatch.__enter__

    def counted(self: WeightWatch) -> WeightWatch:
        entered.append(self)
        return enter(self)

    with mock.patch.object(WeightWatch, "__enter__", counted), torch.no_grad():
        model(batches(1)[0])
        assert not entered
