"""What is done inside disable_adapters: copies, for which nobody ends the block, and a choice of who trains."""

import copy
import io
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import vera_fx
from tests.helpers import assert_close, fill_vectors
from tests.model.test_merge_state import Net, X, net


def pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])


def flags(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, p.requires_grad) for name, p in model.named_parameters()]


@COPIES
@pytest.mark.parametrize("merged", [None, "to rounding", "exactly"])
def test_a_copy_is_on_and_the_original_is_off(
    copied: Callable[[Any], Any], merged: str | None
) -> None:
    model = net()
    frozen = model.vera.adapter("default").vectors.by_path["lin"].vera_lambda_d
    frozen.requires_grad = False  # stays so in the copy
    on, before = model(X).detach(), flags(model)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    if merged:
        vera_fx.merge(model, keep_base=merged == "exactly")
    with vera_fx.disable_adapters(model), vera_fx.disable_adapters(model):
        off = model(X).detach()
        other = copied(model)
        assert vera_fx.active_adapters(other) == ["default"]
        assert vera_fx.active_adapters(model) == []
        assert_close(other(X).detach(), on, factor=5)
        assert torch.equal(model(X).detach(), off)
        assert flags(other) == before
        assert not any(p.requires_grad for p in model.parameters())
    assert (on - off).abs().min() > 1e-3
    assert_close(model(X).detach(), on, factor=5)

    assert other.vera.merged == (("default",) if merged else ())
    with vera_fx.disable_adapters(other):
        assert_close(other(X).detach(), off, factor=5)
    vera_fx.unmerge(other)
    for name, parameter in other.named_parameters():
        assert_close(parameter.detach(), base[name], factor=0 if merged == "exactly" else 5)
    assert_close(other(X).detach(), on, factor=5)


@COPIES
def test_a_switch_inside_the_block_goes_along(copied: Callable[[Any], Any]) -> None:
    model = net()
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    fill_vectors(model)
    vera_fx.set_adapter(model, "other")
    expected = model(X).detach()
    vera_fx.set_adapter(model, "default")
    with vera_fx.disable_adapters(model):
        vera_fx.set_adapter(model, "other")
        copy_of_it = copied(model)
    assert_close(copy_of_it(X).detach(), expected, factor=5)
    trained = {name.split(".")[2] for name, flag in flags(copy_of_it) if flag}
    assert trained == {"other"}


def test_who_trains_is_chosen_anew_inside_disable() -> None:
    """The active adapter, which trained before, does not wake with the one that was chosen."""
    model = net()
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    with vera_fx.disable_adapters(model):
        vera_fx.train_adapters(model, ["other"])
        assert not any(p.requires_grad for p in model.parameters())
    training = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert training == {"other"}
    assert vera_fx.active_adapters(model) == ["default"]


def test_a_shallow_copy_shares_the_block() -> None:
    """It has the same adapters, and so is on when they are."""
    model = net()
    on = model(X).detach()
    with vera_fx.disable_adapters(model):
        off = model(X).detach()
        other = copy.copy(model)
        assert torch.equal(other(X).detach(), off)
        assert torch.equal(model(X).detach(), off)
    assert torch.equal(other(X).detach(), on)


def test_pefts_copies_stay_disabled() -> None:
    base = Net()
    config = peft.VeraConfig(r=2, target_modules=["lin"], init_weights=False)
    model = peft.get_peft_model(base, config).eval()
    with model.disable_adapter():
        off, other = model(X), copy.deepcopy(model)
    assert torch.equal(other(X), off)
    assert not torch.equal(model(X), off)
