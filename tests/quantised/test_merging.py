"""Merges into quantised weights: what is lost is told, what was there comes back to the bit."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import vera_fx
from tests.helpers import assert_close, fill_adapters
from tests.quantised.backends import ALL, BITSANDBYTES, INPUTS, TARGETS, quantise, quantised
from vera_fx.products.kinds import rewriting_of

pytestmark = pytest.mark.filterwarnings("ignore:.*passes no gradient on to its input")
OTHER_SCALES = ("ao-int8", "ao-int8-dynamic", "ao-int4")
"""What torchao rounds twice, as its scales reach a little beyond the values: see `torchao_weights`."""


def adapted(name: str) -> Any:
    config = vera_fx.VeraConfig(r=5, target_modules=TARGETS)
    model = vera_fx.adapt(quantised(name), config)
    vera_fx.add_adapter(model, "other", config)
    fill_adapters(model)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**INPUTS).logits


def dense(value: torch.Tensor) -> torch.Tensor:
    return (
        value.dequantize()
        if hasattr(value, "dequantize") and type(value) is not torch.Tensor
        else value
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.norm(a - b))


@torch.no_grad()
def reference(name: str) -> Any:
    """The quantised base with its targets quantised anew, by their library, from the exact sums."""
    sums = vera_fx.unload(adapted(name), merge=True)
    anew, base = quantise(name, sums), quantised(name)
    for path in (path for path, _ in base.named_modules() if path.endswith(tuple(TARGETS))):
        parent, _, last = path.rpartition(".")
        setattr(base.get_submodule(parent), last, anew.get_submodule(path))
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # packing would round the scales
    return base


@pytest.mark.parametrize("name", ALL)
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
    share = 0.6 if "4" in name else 0.35 if "float8" in name else 0.1
    assert 0 < distance(merged, unmerged) < share * distance(base, unmerged)
    with vera_fx.disable_adapters(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)
    vera_fx.unmerge(model)
    assert torch.equal(logits(model), unmerged)


@pytest.mark.parametrize("name", ALL)
def test_merged_is_the_sum_quantised_by_its_library(name: str) -> None:
    model, wanted = adapted(name), reference(name)
    with pytest.warns(vera_fx.RequantisedWarning):
        vera_fx.merge(model, requantise=True, keep_base=True)
    if name in OTHER_SCALES:
        exact = logits(adapted(name))
        assert distance(logits(model), exact) < 1.1 * distance(logits(wanted), exact)
    else:
        assert torch.equal(logits(model), logits(wanted))


@pytest.mark.parametrize("name", ALL)
def test_what_holds_the_weights_comes_back(name: str) -> None:
    """The very objects, and whatever they hold to the bit."""
    model = adapted(name)
    path = "model.layers.1.mlp.down_proj"
    module = model.get_submodule(path)
    held = rewriting_of(model, path).stored(module)
    before = copy.deepcopy(module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vera_fx.merge(model, requantise=True)
    key = next(key for key in held if key in ("weight", "W_q"))
    assert rewriting_of(model, path).stored(module)[key] is not held[key]
    vera_fx.unmerge(model)
    assert all(
        value is held[name]
        for name, value in rewriting_of(model, path).stored(module).items()
        if name != "state"
    )
    after = module.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert (
            str(value) == str(after[key])
            if not torch.is_tensor(value)
            else torch.equal(dense(value), dense(after[key]))
        )


@pytest.mark.parametrize("name", [name for name in ALL if name not in BITSANDBYTES])
def test_merged_weights_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """bitsandbytes' state dicts load through transformers alone: see `test_loaded`."""
    model = adapted(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vera_fx.merge(model, requantise=True)
    merged = logits(model)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("vera.")}
    torch.save(state, tmp_path / "state.pt")
    fresh = quantised(name)
    assert distance(logits(fresh), merged) > 0
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False), assign=True)
    assert torch.equal(logits(fresh), merged)


@pytest.mark.parametrize("name", ["nf4", "int8", "ao-int8", "ao-int4", "hqq-4", "quanto-4"])
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


@pytest.mark.parametrize("name", ["nf4", "fp4", "ao-int4", "hqq-4", "quanto-4"])
def test_four_bits_have_to_be_asked_for(name: str) -> None:
    model = adapted(name)
    before = logits(model)
    with pytest.raises(
        vera_fx.AdapterError, match=r"has 4 bits or fewer.*merge\(model, requantise=True\)"
    ):
        vera_fx.merge(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["int8", "ao-int8", "ao-float8", "quanto-8"])
def test_eight_bits_have_not(name: str) -> None:
    model = adapted(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.warns(vera_fx.RequantisedWarning):
            vera_fx.merge(model)
    with pytest.warns(UserWarning, match="already merged"):
        vera_fx.merge(model)


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
