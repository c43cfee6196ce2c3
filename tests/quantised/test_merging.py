"""Merges into quantised weights: what is lost is told, what was there comes back to the bit."""

import warnings
from typing import Any

import pytest
import torch

import vera_fx
from tests.helpers import assert_close, fill_adapters
from tests.quantised.backends import BITSANDBYTES, INPUTS, TARGETS, quantised


def adapted(name: str) -> Any:
    config = vera_fx.VeraConfig(r=5, target_modules=TARGETS)
    model = vera_fx.adapt(quantised(name), config)
    vera_fx.add_adapter(model, "other", config)
    fill_adapters(model)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**INPUTS).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.norm(a - b))


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_merged_disabled_and_unmerged(name: str) -> None:
    model = adapted(name)
    unmerged = logits(model)
    with vera_fx.disable_adapters(model):
        base = logits(model)
    with pytest.warns(
        vera_fx.RequantisedWarning, match=r"6 targets .* by up to \d+% of that change"
    ):
        vera_fx.merge(model, requantise=True)
    merged = logits(model)
    # Most of what the adapter does is there, less what was rounded.
    share = 0.6 if "4" in name else 0.1
    assert 0 < distance(merged, unmerged) < share * distance(base, unmerged)
    with vera_fx.disable_adapters(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)
    vera_fx.unmerge(model)
    assert torch.equal(logits(model), unmerged)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_two_merged_come_out_in_turn(name: str) -> None:
    model = adapted(name)
    vera_fx.set_adapter(model, ["default", "other"])
    both = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vera_fx.merge(model, ["default"], requantise=True)
        one = logits(model)
        vera_fx.merge(model, ["other"], requantise=True)
    assert distance(logits(model), both) > 0
    assert distance(one, both) > 0
    vera_fx.unmerge(model)
    assert torch.equal(logits(model), both)


def test_four_bits_have_to_be_asked_for() -> None:
    model = adapted("nf4")
    before = logits(model)
    with pytest.raises(vera_fx.AdapterError, match=r"has 4 bits.*merge\(model, requantise=True\)"):
        vera_fx.merge(model)
    assert torch.equal(logits(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.warns(vera_fx.RequantisedWarning):
            vera_fx.merge(adapted("int8"))


@pytest.mark.parametrize("name", ["ao-int8", "hqq-4", "quanto-8", "quanto-4"])
def test_others_are_refused_and_nothing_is_lost(name: str) -> None:
    """PEFT adds to a quanto weight without an error, and the adapter is gone."""
    model = adapted(name)
    before = logits(model)
    with pytest.raises(vera_fx.AdapterError, match=r"not plain.*unload\(merge=True\)"):
        vera_fx.merge(model)
    assert torch.equal(logits(model), before)
    plain = vera_fx.unload(model, merge=True)
    assert distance(logits(plain), before) < 1e-4 * float(torch.linalg.norm(before))


def test_weights_that_were_packed_are_unpacked() -> None:
    """One call without gradients packs 4-bit weights on CPUs with AVX512-BF16; packed they have none."""
    model = quantised("nf4", torch.bfloat16)
    if not model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("this CPU packs no weights")
    with torch.no_grad():
        model(**INPUTS)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu
    config = vera_fx.VeraConfig(r=5, target_modules=TARGETS)
    found, expected = [], []
    for each, values in (
        (model, found),
        (quantised("nf4", torch.bfloat16), expected),
    ):
        vera_fx.adapt(each, config)
        fill_adapters(each)
        each(**INPUTS).loss.backward()
        values.extend(p.grad for p in each.parameters() if p.requires_grad)
    for value, reference in zip(found, expected, strict=True):
        # The packing has rounded the blocks' scales to bfloat16.
        assert_close(value, reference, factor=2000)
        assert value.abs().sum() > 0
    plain = vera_fx.unload(model)
    assert plain.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu
