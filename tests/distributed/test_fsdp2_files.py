"""Adapters of sharded models on disk, in state dictionaries and merged: whole, and the same in every process."""

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
from tests.distributed.test_fsdp2 import sharded
from tests.distributed.training import adapted, base, batches, config, mine, train, vectors, whole
from tests.helpers import assert_close, assert_far_apart

X = batches(1)[0]


def shared(path: Path) -> Path:
    """The first process's path."""
    paths: list[Any] = [path]
    dist.broadcast_object_list(paths)
    return paths[0]


def trained() -> tuple[Any, nn.Module]:
    model, alone = sharded(adapted()), adapted()
    train(model, map(mine, batches()))
    train(alone, batches())
    return model, alone


@two_processes
def test_saved_adapters_are_whole(tmp_path: Path) -> None:
    model, alone = trained()
    folder = vera_fx.save_adapter(model, shared(tmp_path) / "adapter")
    dist.barrier()
    expected = vera_fx.adapter_state_dict(alone)
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_close(value, expected[key], what=key)
    theirs = peft.PeftModel.from_pretrained(base(), folder)
    with torch.no_grad():
        assert_close(theirs(X), alone(X))


@two_processes
def test_as_lora(tmp_path: Path) -> None:
    model, alone = trained()
    folder = shared(tmp_path) / "lora"
    vera_fx.to_lora(model, folder)
    dist.barrier()
    with torch.no_grad():
        assert_close(peft.PeftModel.from_pretrained(base(), folder)(X), alone(X), factor=5)


@two_processes
def test_loading_into_a_sharded_adapter() -> None:
    source = adapted()
    train(source, batches())
    state = vera_fx.adapter_state_dict(source)
    model = sharded(adapted())
    train(model, [mine(X)])
    vera_fx.load_adapter_state_dict(model, state)
    found = vera_fx.adapter_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    with torch.no_grad():
        assert_close(model(X), source(X))


@two_processes
def test_loading_another_adapter_for_inference(tmp_path: Path) -> None:
    source = adapted()
    train(source, batches())
    folder = shared(tmp_path) / "adapter"
    if dist.get_rank() == 0:
        vera_fx.save_adapter(source, folder)
    dist.barrier()
    model = sharded(adapted().eval())
    vera_fx.load_adapter(model, folder, adapter_name="other")
    vera_fx.set_adapter(model, "other")
    with torch.no_grad():
        assert_close(model(X), source(X))
        vera_fx.set_adapter(model, "default")
        assert_far_apart(model(X), source(X))


@pytest.mark.parametrize("keep_base", [False, True])
@two_processes
def test_merged_and_back(keep_base: bool) -> None:
    model, alone = trained()
    model.eval()
    weight = whole(model.layers[0].up.weight).clone()
    with torch.no_grad():
        expected = model(X)
        vera_fx.merge(model, keep_base=keep_base)
        vera_fx.merge(alone)
        assert_close(whole(model.layers[0].up.weight), alone.layers[0].up.weight)
        assert_far_apart(whole(model.layers[0].up.weight), weight)
        assert_close(model(X), expected, factor=20)
        vera_fx.unmerge(model)
        assert_close(whole(model.layers[0].up.weight), weight)
        assert_close(model(X), expected, factor=5)
    if keep_base:
        model.layers[0].reshard()
        assert torch.equal(whole(model.layers[0].up.weight), weight)


@two_processes
def test_values_that_are_not_finite_are_refused_by_all() -> None:
    model = sharded(adapted())
    with torch.no_grad():
        if dist.get_rank() == 0:  # a weight's rows that one process has
            model.layers[0].up.weight.to_local()[0, 0] = torch.inf
    with pytest.raises(vera_fx.AdapterError, match="would have NaN or infinity"):
        vera_fx.merge(model)


@two_processes
def test_what_needs_the_class_or_the_whole_model_is_refused() -> None:
    model = sharded(adapted().eval())
    with pytest.raises(vera_fx.AdapterError, match="sharded .*save the adapter and load the base"):
        vera_fx.unload(model)
    with pytest.raises(vera_fx.ExportError, match="sharded .*a program holds whole weights"):
        vera_fx.export_program(model, (X,))
    plain = sharded(base())
    with pytest.raises(vera_fx.TargetError, match="'head' is sharded .*adapt the model before"):
        vera_fx.adapt(plain, config(target_modules=["up"], modules_to_save=["head"]))
    assert not any("vera" in name for name, _ in plain.named_parameters())
    assert len(vectors(model)) == 14
