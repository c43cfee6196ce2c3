"""What is merged comes out again, whatever happens in between; and states say what is in them."""

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, fill_vectors

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
HEAD: dict[str, Any] = {"target_modules": ["lin"], "modules_to_save": ["head"]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lin(x)))


def net(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = vera_fx.adapt(Net().eval(), vera_fx.VeraConfig(r=3, **(fields or HEAD)))
    fill_vectors(model)
    if "modules_to_save" in (fields or HEAD):
        with torch.no_grad():
            model.vera.adapter("default").copies.by_path["head"].weight.mul_(2)
    return model


def base_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {key: tensor.clone() for key, tensor in state.items() if not key.startswith("vera.")}


def assert_base(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = base_of(model)
    assert now.keys() == before.keys()
    for key, tensor in before.items():
        assert_close(now[key], tensor, factor=5)


def decay(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.vera.adapters.parameters():
            parameter.mul_(0.5)


@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.parametrize(
    "between",
    [
        decay,
        lambda m: m.to(torch.float64).to(torch.float32),
        lambda m: vera_fx.add_adapter(m, "second", vera_fx.VeraConfig(r=2, target_modules=["lin"])),
    ],
    ids=["vectors change", "casts", "add"],
)
def test_what_went_in_comes_out(between: Callable[[nn.Module], object], keep_base: bool) -> None:
    model = net()
    before = base_of(model)
    vera_fx.merge(model, keep_base=keep_base)
    between(model)
    vera_fx.unmerge(model)
    assert_base(model, before)
    if keep_base:
        assert all(torch.equal(tensor, before[key]) for key, tensor in base_of(model).items())


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("keep_base", [False, True])
def test_copies_of_a_merged_model_unmerge(copied: Callable[[Any], Any], keep_base: bool) -> None:
    model = net()
    before, expected = base_of(model), model(X)
    vera_fx.merge(model, keep_base=keep_base)
    other = copied(model)
    for one in (model, other):
        assert_close(one(X), expected, factor=5)
        vera_fx.unmerge(one)
        assert_base(one, before)
        assert_close(one(X), expected, factor=5)


def test_an_adapters_state_is_its_own_while_merged(tmp_path: Path) -> None:
    model = net()
    before = {k: v.clone() for k, v in vera_fx.adapter_state_dict(model).items()}
    expected = model(X)
    vera_fx.merge(model)
    now = vera_fx.adapter_state_dict(model)
    assert all(torch.equal(now[key], before[key]) for key in before)

    vera_fx.save_adapter(model, tmp_path)
    vera_fx.unmerge(model)
    fresh = vera_fx.load_adapter(vera_fx.unload(model), tmp_path)
    assert_close(fresh(X), expected, factor=5)


def test_a_merged_adapter_is_not_loaded_into() -> None:
    model = net()
    state = vera_fx.adapter_state_dict(model)
    vera_fx.merge(model)
    with pytest.raises(vera_fx.AdapterError, match="'default' is merged into the base"):
        vera_fx.load_adapter_state_dict(model, state)


def test_a_merged_state_is_not_loaded_and_does_not_pass_for_another() -> None:
    model, fresh = net(), net()
    before, plain = base_of(fresh), copy.deepcopy(model.state_dict())
    vera_fx.merge(model)
    merged = model.state_dict()
    for strict in (True, False):
        with pytest.raises(vera_fx.CheckpointError, match="adapters were merged into its base"):
            fresh.load_state_dict(merged, strict=strict)
        with pytest.raises(vera_fx.CheckpointError, match="'default' is merged into this model's"):
            model.load_state_dict(plain, strict=strict)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_of(fresh).items())

    wrapper = nn.Sequential(fresh)
    with pytest.raises(vera_fx.CheckpointError, match="adapters were merged into its base"):
        wrapper.load_state_dict({f"0.{key}": tensor for key, tensor in merged.items()})
    vera_fx.unmerge(model)
    fresh.load_state_dict(model.state_dict())
    assert_close(fresh(X), model(X), factor=5)


def test_inside_disable_a_merged_models_state_is_plain() -> None:
    model, fresh = net(), net()
    before = base_of(model)
    vera_fx.merge(model)
    with vera_fx.disable_adapters(model):
        assert_base(model, before)
        fresh.load_state_dict(model.state_dict())
    assert "vera.merged" in model.state_dict()


def test_setting_inside_disable_ends_the_merge() -> None:
    model = net()
    before = base_of(model)
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    fill_vectors(model)
    vera_fx.set_adapter(model, "other")
    other = model(X)
    vera_fx.set_adapter(model, "default")
    vera_fx.merge(model)
    with vera_fx.disable_adapters(model):
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            vera_fx.set_adapter(model, "other")
        assert_base(model, before)
    assert_base(model, before)
    assert_close(model(X), other, factor=5)


def test_deleting_and_merging_inside_disable() -> None:
    model = net()
    expected = model(X)
    vera_fx.merge(model)
    with vera_fx.disable_adapters(model), vera_fx.disable_adapters(model):
        with pytest.raises(vera_fx.AdapterError, match="'default' is merged"):
            vera_fx.delete_adapter(model, "default")
        with pytest.raises(vera_fx.AdapterError, match="cannot be merged inside disable_adapters"):
            vera_fx.merge(model)
        with pytest.raises(vera_fx.AdapterError, match="cannot be merged inside disable_adapters"):
            vera_fx.unload(model, merge=True)
    assert_close(model(X), expected, factor=5)
    with vera_fx.disable_adapters(model):
        vera_fx.unmerge(model)
    assert model.vera.merged == ()
    assert_close(model(X), expected, factor=5)


def test_unloading_inside_disable() -> None:
    model = net()
    before = base_of(model)
    vera_fx.merge(model)
    with vera_fx.disable_adapters(model):
        vera_fx.unload(model)
    assert_base(model, before)
    assert type(model) is Net


def test_copies_of_one_module_are_not_merged_together() -> None:
    model = net()
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=2, **HEAD))
    before = base_of(model)
    with pytest.raises(vera_fx.AdapterError, match="cannot be merged together.*copy of 'head'"):
        vera_fx.merge(model, ["default", "other"])
    assert all(torch.equal(tensor, before[key]) for key, tensor in base_of(model).items())
    vera_fx.merge(model)
    with pytest.raises(vera_fx.AdapterError, match="cannot be merged together.*copy of 'head'"):
        vera_fx.merge(model, "other")


def test_explain_says_what_is_merged_and_what_is_off() -> None:
    model = net()
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    assert vera_fx.explain(model).state() == "default, other (active: default)"
    vera_fx.merge(model)
    assert vera_fx.explain(model).state() == "default, other (active: none; merged: default)"
    with vera_fx.disable_adapters(model):
        found = vera_fx.explain(model)
        assert found.state() == "default, other (active: none; disabled)"
        assert found.state() in str(found)
        assert found.state() in found.html()
    vera_fx.unmerge(model)
    assert vera_fx.explain(model).state() == "default, other (active: default)"


def test_nothing_requires_gradients_inside_disable() -> None:
    model = net()
    frozen = model.vera.adapter("default").vectors.by_path["lin"].vera_lambda_d
    frozen.requires_grad = False
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert any(flag for _, flag in before)
    with vera_fx.disable_adapters(model):
        with vera_fx.disable_adapters(model):
            assert not any(p.requires_grad for p in model.parameters())
            assert not model(X).requires_grad
        assert not any(p.requires_grad for p in model.parameters())
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before

    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    with vera_fx.disable_adapters(model):
        vera_fx.set_adapter(model, "other")
        assert not any(p.requires_grad for p in model.parameters())
    training = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert training == {"other"}


def test_threads_that_disable_leave_the_adapters_on() -> None:
    model = net()
    expected, vectors = model(X), [p for p in model.parameters() if p.requires_grad]
    vera_fx.merge(model)

    def work() -> None:
        for _ in range(50):
            with vera_fx.disable_adapters(model):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.vera.enabled
    assert all(p.requires_grad for p in vectors)
    assert_close(model(X), expected, factor=50)


@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_a_copy_and_an_update_of_one_module_in_any_order(order: list[str], keep_base: bool) -> None:
    """One adapter brings a head of its own, the other targets the head."""
    model = net()
    before = base_of(model)
    fields = {"target_modules": ["lin", "head"]}
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=2, **fields))
    fill_vectors(model)
    vera_fx.set_adapter(model, ["default", "other"])
    expected = model(X)
    if order[0] == "other":
        with pytest.raises(vera_fx.AdapterError, match="its own copy of 'head'.*merge both"):
            vera_fx.merge(model, "other", keep_base=keep_base)
        vera_fx.merge(model, order, keep_base=keep_base)
    for name in order if order[0] == "default" else ():
        vera_fx.merge(model, name, keep_base=keep_base)
        assert_close(model(X), expected, factor=10)
    assert_close(model(X), expected, factor=10)
    with vera_fx.disable_adapters(model):
        assert_base(model, before)
    assert_close(model(X), expected, factor=10)
    vera_fx.unmerge(model)
    assert_base(model, before)
    assert_close(model(X), expected, factor=10)
