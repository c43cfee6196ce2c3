"""Adapters of parallel models on disk, merged and unloaded: whole, and the same in every process."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.tensor_parallel import adapted_parallel, parallel
from tests.distributed.test_fsdp2_files import shared
from tests.distributed.training import Net, adapted, base, batches, train, whole
from tests.helpers import assert_close, assert_far_apart

X = batches(1)[0]


def trained(**fields: object) -> tuple[Any, nn.Module]:
    model, alone = adapted_parallel(**fields), adapted(**fields)
    for net in (model, alone):
        train(net, batches())
    return model, alone


@two_processes
def test_any_process_saves_the_whole(tmp_path: Path) -> None:
    model, alone = trained()
    folder = shared(tmp_path) / "adapter"
    if dist.get_rank() == 1:  # nothing is gathered: one alone may do it
        vera_fx.save_adapter(model, folder)
    dist.barrier()
    expected, found = (
        vera_fx.adapter_state_dict(alone),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key], what=key)
    with torch.no_grad():
        output = model(X)
        assert_close(peft.PeftModel.from_pretrained(base(), folder)(X), output)
        loaded = vera_fx.load_adapter(parallel(base()), folder)
        assert_close(loaded(X), output)
        other = vera_fx.load_adapter(adapted_parallel(), folder, adapter_name="other")
        assert_far_apart(other(X), output)
        vera_fx.set_adapter(other, "other")
        assert_close(other(X), output)


@two_processes
def test_loading_into_a_parallel_adapter() -> None:
    model, source = adapted_parallel(), trained()[1]
    state = vera_fx.adapter_state_dict(source)
    vera_fx.load_adapter_state_dict(model, state)
    found = vera_fx.adapter_state_dict(model)
    assert all(torch.equal(found[key], state[key]) for key in state)
    with torch.no_grad():
        assert_close(model(X), source(X))


@two_processes
def test_merged_and_back_and_unloaded(tmp_path: Path) -> None:
    model, alone = trained()
    weights = [model.layers[0].up.weight, model.layers[0].down.weight]
    before = [whole(weight).clone() for weight in weights]
    with torch.no_grad():
        output = model(X)
        vera_fx.merge(model)
        vera_fx.merge(alone)
        for weight, own, old in zip(weights, ("up", "down"), before, strict=True):
            assert_close(whole(weight.detach()), getattr(alone.layers[0], own).weight)
            assert_far_apart(whole(weight.detach()), old)
        assert_close(model(X), output, factor=20)
        vera_fx.unmerge(model)
        assert_close(model(X), output, factor=5)
        folder = vera_fx.to_lora(model, shared(tmp_path) / "lora")
        dist.barrier()
        assert_close(peft.PeftModel.from_pretrained(base(), folder)(X), output, factor=5)
        assert_close(whole(vera_fx.unload(model, merge=True).layers[0].up.weight.detach()),
                     alone.layers[0].up.weight)  # fmt: skip
    assert type(model) is Net
    assert not hasattr(model, "vera")


@two_processes
def test_values_that_are_not_finite_are_refused_by_all() -> None:
    model = adapted_parallel()
    with torch.no_grad():
        if dist.get_rank() == 0:
            model.layers[0].up.weight.to_local()[0, 0] = torch.inf
    with pytest.raises(vera_fx.AdapterError, match="would have NaN or infinity"):
        vera_fx.merge(model)
