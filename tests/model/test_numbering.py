"""A state_dict finds the right projections in a model whose adapters came in another order."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.helpers import fill_vectors
from tests.models import MLP

X = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))


def config(seed: int, r: int = 3, target: str = "lin0") -> vera_fx.VeraConfig:
    return vera_fx.VeraConfig(r=r, target_modules=[target], projection_prng_key=seed)


def net(*names: str, base: nn.Module | None = None, target: str = "lin0") -> Any:
    """Adapters "a", "b" and "c", each with projections of its own, in this order."""
    torch.manual_seed(0)
    model = MLP().eval() if base is None else base
    vera_fx.adapt(model, config("abc".index(names[0]), target=target), adapter_name=names[0])
    for name in names[1:]:
        vera_fx.add_adapter(model, name, config("abc".index(name), target=target))
    fill_vectors(model)
    return model


def answers(model: nn.Module, names: str) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        vera_fx.set_adapter(model, name)
        found[name] = model(X).detach()
    return found


@pytest.mark.parametrize("order", ["abc", "acb", "bca", "cab", "cba"])
def test_adapters_that_came_in_another_order(order: str) -> None:
    model, other = net(*"abc"), net(*order)
    expected = answers(model, "abc")
    other.load_state_dict(model.state_dict())
    for name, found in answers(other, "abc").items():
        assert torch.equal(found, expected[name]), name
    assert (expected["a"] - expected["b"]).abs().min() > 1e-5


def test_numbers_that_a_deletion_leaves() -> None:
    model, other = net(*"abc"), net(*"ca")
    expected = answers(model, "ca")
    vera_fx.set_adapter(model, "c")
    vera_fx.delete_adapter(model, "b")
    vera_fx.delete_adapter(model, "a")
    vera_fx.add_adapter(model, "a", config(0))
    state = copy.deepcopy(model.state_dict())
    assert {key.split(".")[2] for key in state if "projections" in key} != {"0", "1"}
    other.load_state_dict(state)
    assert torch.equal(answers(other, "c")["c"], expected["c"])
    nn.ModuleDict({"inner": net(*"ca")}).load_state_dict(
        {f"inner.{key}": tensor for key, tensor in state.items()}
    )


def test_a_state_of_fewer_adapters() -> None:
    model, other = net("b"), net(*"ab")
    expected, before = answers(model, "b"), answers(other, "a")
    other.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(answers(other, "b")["b"], expected["b"])
    assert torch.equal(answers(other, "a")["a"], before["a"])


def test_a_state_in_half_precision() -> None:
    model, other = net(*"ab"), net(*"ba")
    state = {key: tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()}
    expected = answers(net(*"ab"), "ab")
    other.load_state_dict(state)
    for name, found in answers(other, "ab").items():
        torch.testing.assert_close(found, expected[name], rtol=0.05, atol=0.05)


def scaled(model: Any, factor: float) -> Any:
    with torch.no_grad():
        for pair in model.vera.projections.children():
            pair.vera_A.mul_(factor)
    return model


def test_changed_projections_of_other_sizes_are_told_apart() -> None:
    model, other = net("a"), net("a")
    for one in (model, other):
        vera_fx.add_adapter(one, "wide", config(1, r=5))
    fill_vectors(model)
    expected = {}
    scaled(model, 2.0)
    vera_fx.refresh(model)
    for name in ("a", "wide"):
        vera_fx.set_adapter(model, name)
        expected[name] = model(X).detach()
    other.load_state_dict(model.state_dict())
    for name, wanted in expected.items():
        vera_fx.set_adapter(other, name)
        assert torch.equal(other(X).detach(), wanted)


def test_projections_that_could_be_anyones_are_refused_and_nothing_changes() -> None:
    model, other = scaled(net(*"ab"), 2.0), net(*"ba")
    before = copy.deepcopy(other.state_dict())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(vera_fx.CheckpointError, match="cannot be told whose they are"):
        other.load_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())


def test_models_that_are_containers() -> None:
    """Those keep the bank beside their elements."""
    models = []
    for order in ("ab", "ba"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 3))
        models.append(net(*order, base=model, target="0"))
    expected = answers(models[0], "ab")
    models[1].load_state_dict(models[0].state_dict())
    assert all(torch.equal(found, expected[n]) for n, found in answers(models[1], "ab").items())
