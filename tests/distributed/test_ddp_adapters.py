"""Adapters that change after the model was wrapped in DistributedDataParallel: right, or refused, never in doubt."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.training import (
    RANK,
    adapted,
    assert_trained,
    base,
    batches,
    config,
    mean_loss,
    mine,
    train,
    trained_alone,
    vectors,
)
from tests.helpers import fill_adapters

X = batches(1)[0]


def two_adapters() -> torch.nn.Module:
    model = adapted()
    vera_fx.add_adapter(model, "other", config(r=RANK + 2))
    fill_adapters(model)
    return model


def refused(model: torch.nn.Module, name: str) -> None:
    """A training call is refused in every process, whatever else it is called for is not."""
    with pytest.raises(
        vera_fx.AdapterError, match=f"adapter '{name}' trains now, .*wrap the model"
    ):
        model(mine(X))
    with torch.no_grad():
        model(mine(X))


@two_processes
def test_a_switch_is_refused_until_the_model_is_wrapped_again() -> None:
    model = DistributedDataParallel(two_adapters())
    train(model, map(mine, batches()))
    vera_fx.set_adapter(model, "other")
    refused(model, "other")
    again = DistributedDataParallel(model.module)
    train(again, map(mine, batches()))

    alone = two_adapters()
    vera_fx.set_adapter(alone, "other")
    train(alone, batches())
    assert_trained(again, vectors(alone))


@two_processes
def test_a_switch_back_is_fine() -> None:
    model = DistributedDataParallel(two_adapters())
    vera_fx.set_adapter(model, "other")
    model.eval()
    with torch.no_grad():
        model(mine(X))
    model.train()
    vera_fx.set_adapter(model, "default")
    with vera_fx.disable_adapters(model), torch.no_grad():
        model(mine(X))
    train(model, map(mine, batches()))
    alone = two_adapters()
    train(alone, batches())
    assert_trained(model, vectors(alone))


@two_processes
def test_one_more_beside_it_is_refused() -> None:
    model = DistributedDataParallel(two_adapters())
    vera_fx.set_adapter(model, ["default", "other"])
    refused(model, "other")


@two_processes
def test_adding_and_loading_after_the_wrap() -> None:
    model = DistributedDataParallel(adapted())
    vera_fx.add_adapter(model, "late")
    train(model, map(mine, batches()))  # it is not active
    assert_trained(model, trained_alone())
    vera_fx.set_adapter(model, "late")
    refused(model, "late")


@two_processes
def test_adapting_after_the_wrap() -> None:
    wrapper = DistributedDataParallel(base())
    with pytest.raises(vera_fx.AdapterError, match="adapt the model first and wrap it then"):
        vera_fx.adapt(wrapper, config())
    vera_fx.adapt(wrapper.module, config())
    refused(wrapper, "default")


@two_processes
def test_training_is_allowed_after_the_wrap() -> None:
    model = adapted()
    vera_fx.set_trainable(model, "default", trainable=False)
    model.register_parameter("other", torch.nn.Parameter(torch.zeros(3)))
    wrapped = DistributedDataParallel(model)
    vera_fx.set_trainable(wrapped, "default")
    refused(wrapped, "default")


@two_processes
def test_part_of_a_larger_model() -> None:
    """The adapted model inside of another one, which is what is wrapped."""

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = two_adapters()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 2

    outer = Outer()
    wrapped = DistributedDataParallel(outer)
    mean_loss(wrapped(mine(X))).backward()
    assert all(p.grad is not None for p in outer.parameters() if p.requires_grad)
    vera_fx.set_adapter(outer.inner, "other")
    refused(wrapped, "other")


@pytest.mark.parametrize("who", ["all", "first"])
@two_processes
def test_saving_gives_one_whole_adapter(tmp_path: Path, who: str) -> None:
    paths: list[object] = [tmp_path]
    dist.broadcast_object_list(paths)
    folder = Path(str(paths[0])) / "adapter"
    model = DistributedDataParallel(adapted())
    train(model, map(mine, batches()))
    if who == "all" or dist.get_rank() == 0:
        vera_fx.save_adapter(model, folder)
    dist.barrier()
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} - {".lock"} == files
    state = load_file(folder / "adapter_model.safetensors")
    expected = vera_fx.adapter_state_dict(model.module)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    fresh = vera_fx.load_adapter(base(), folder, plan="factored")
    with torch.no_grad():
        assert torch.equal(fresh(X), model.module.eval()(X))
