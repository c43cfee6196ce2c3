"""Merging, unmerging and unloading, against PEFT 0.21.2."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import vera_fx
from tests.helpers import adapter_vectors, assert_close, assert_far_apart, fill_adapters
from tests.models import MLP, small_llama

X = torch.randn(5, 10, generator=torch.Generator().manual_seed(3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layers(nn.Module):
    """A linear layer, a Conv1D and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.conv, self.head = nn.Linear(10, 20), Conv1D(12, 20), nn.Linear(12, 3)
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(torch.tanh(self.lin0(x)))))


TARGETS = ["lin0", "conv"]


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Layers().eval()


def both(
    base: nn.Module, names: tuple[str, ...] = ("default",), *, autocast: bool = True, **fields: Any
) -> tuple[peft.PeftModel, nn.Module]:
    """Two models with the same adapters, active all together, with the same vectors."""
    fields = {"r": 4, "target_modules": TARGETS} | fields
    first, *more = names
    options = {"adapter_name": first, "autocast_adapter_dtype": autocast}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**fields), **options)
        ours = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(**fields), **options)
        for name in more:
            theirs.add_adapter(name, peft.VeraConfig(**fields), autocast_adapter_dtype=autocast)
            vera_fx.add_adapter(ours, name, autocast_adapter_dtype=autocast)
    theirs.base_model.set_adapter(list(names)), vera_fx.set_adapter(ours, names)
    fill_adapters(theirs), fill_adapters(ours)
    return theirs.eval(), ours.eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The base weights of PEFT's model or ours, by target."""
    if isinstance(model, peft.PeftModel):
        return {n: model.get_submodule(f"base_model.model.{n}.base_layer").weight for n in TARGETS}
    return {n: model.get_submodule(n).weight for n in TARGETS}


def exact_sums(model: nn.Module) -> dict[str, Tensor]:
    """The base weights plus what the default adapter adds to them, in float64."""
    (pair,) = model.vera.projections.values()
    found: dict[str, Tensor] = {}
    for name, weight in weights(model).items():
        target = model.vera.structure.targets[name]
        d, b = (adapter_vectors(model)["default", name, vector].double() for vector in "db")
        A, B = pair.vera_A.double()[:, : target.in_features], pair.vera_B.double()[: len(b)]
        delta = (b[:, None] * B) @ (d[:, None] * A)
        found[name] = (weight.double() + (delta.T if name == "conv" else delta)).detach()
    return found


class TestWeights:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("autocast", [True, False])
    def test_merged_weights_are_pefts(
        self, base: nn.Module, dtype: torch.dtype, autocast: bool
    ) -> None:
        theirs, ours = both(base.to(dtype), autocast=autocast)
        expected, x = ours(X.to(dtype)), X.to(dtype)
        exact = exact_sums(ours)
        theirs.merge_adapter(), vera_fx.merge(ours)
        for name, weight in weights(theirs).items():
            if autocast or dtype == torch.float32:
                assert torch.equal(weights(ours)[name], weight), name
            else:  # PEFT rounds what it adds, and then the sum
                errors = [
                    (w.double() - exact[name]).abs().sum() for w in (weights(ours)[name], weight)
                ]
                assert errors[0] < errors[1]
            assert_close(weights(ours)[name], weight)
        assert_close(ours(x), theirs(x), factor=5)
        assert_close(ours(x), expected, factor=20)
        assert_far_apart(expected.float(), base(x).float())
        theirs.unmerge_adapter(), vera_fx.unmerge(ours)
        for name, weight in weights(theirs).items():
            assert_close(weights(ours)[name], weight)

    def test_round_trip_is_within_pefts_tolerance(self, base: nn.Module) -> None:
        _, ours = both(base)
        before = {name: weight.clone() for name, weight in weights(ours).items()}
        for _ in range(3):
            vera_fx.merge(ours)
            vera_fx.unmerge(ours)
        for name, weight in weights(ours).items():
            torch.testing.assert_close(weight, before[name], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_kept_base_comes_back_bit_for_bit(self, base: nn.Module, dtype: torch.dtype) -> None:
        """PEFT subtracts again, which leaves a rounded base; in half precision a visibly other one."""
        theirs, ours = both(base.to(dtype))
        before = {name: weight.clone() for name, weight in weights(ours).items()}
        vera_fx.merge(ours, keep_base=True)
        assert not any(torch.equal(w, before[name]) for name, w in weights(ours).items())
        vera_fx.unmerge(ours)
        assert all(torch.equal(w, before[name]) for name, w in weights(ours).items())
        theirs.merge_adapter(), theirs.unmerge_adapter()
        assert not all(torch.equal(w, before[name]) for name, w in weights(theirs).items())

    def test_several_at_once_one_by_one_and_in_peft(self, base: nn.Module) -> None:
        names = ("a", "b", "c")
        theirs, ours = both(base, names)
        _, singly = both(base, names)
        expected = ours(X)
        theirs.merge_adapter(list(names)), vera_fx.merge(ours, names)
        for name in names:
            vera_fx.merge(singly, name)
        for name, weight in weights(theirs).items():
            assert torch.equal(weights(ours)[name], weight)
            assert torch.equal(weights(singly)[name], weight)
        assert_close(ours(X), expected, factor=20)
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
            vera_fx.merge(ours)


class TestSafety:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_broken_adapters_are_refused_before_anything_changes(
        self, base: nn.Module, value: float
    ) -> None:
        theirs, ours = both(base, ("good", "broken"))
        for model in (theirs, ours):
            with torch.no_grad():
                adapter_vectors(model)["broken", "conv", "b"][2] = value
        before = {name: weight.clone() for name, weight in weights(ours).items()}
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            theirs.merge_adapter(safe_merge=True)
        with pytest.raises(
            vera_fx.AdapterError, match="'broken' cannot be merged.*NaN or infinity"
        ):
            vera_fx.merge(ours)
        assert all(torch.equal(w, before[name]) for name, w in weights(ours).items())
        assert not all(torch.equal(w, before[name]) for name, w in weights(theirs).items())

    def test_sums_that_overflow_are_refused(self, base: nn.Module) -> None:
        """Each vector is finite, the weight in float16 is not."""
        _, ours = both(base.half())
        with torch.no_grad():
            adapter_vectors(ours)["default", "lin0", "b"].fill_(6e4)
            adapter_vectors(ours)["default", "lin0", "d"].fill_(6e4)
        with pytest.raises(vera_fx.AdapterError, match="NaN or infinity"):
            vera_fx.merge(ours)
        with pytest.raises(vera_fx.AdapterError, match="NaN or infinity"):
            vera_fx.unload(ours, merge=True)
        assert vera_fx.adapter_names(ours) == ["default"]


class TestUnload:
    @pytest.mark.parametrize("merge", [True, False])
    def test_gives_what_peft_gives(self, base: nn.Module, merge: bool) -> None:
        theirs, ours = both(base, modules_to_save=["head"])
        for model in (theirs, ours):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.requires_grad and "head" in name:
                        p.add_(0.5)
        expected = theirs(X)
        plain = theirs.merge_and_unload() if merge else theirs.unload()
        unloaded = vera_fx.unload(ours, merge=merge)

        assert type(unloaded) is Layers
        assert unloaded is ours
        assert unloaded.state_dict().keys() == base.state_dict().keys()
        if merge:
            for name, value in plain.state_dict().items():
                assert torch.equal(unloaded.state_dict()[name], value), name
            assert_close(unloaded(X), expected, factor=5)
        else:  # PEFT leaves the trained head in the base that it gives back
            assert not torch.equal(plain(X), base(X))
            assert torch.equal(unloaded(X), base(X))

    def test_chosen_adapters(self, base: nn.Module) -> None:
        theirs, ours = both(base, ("a", "b"))
        plain = theirs.merge_and_unload(adapter_names=["b"])
        vera_fx.set_adapter(ours, "b")
        unloaded = vera_fx.unload(ours, merge=True)
        assert torch.equal(unloaded(X), plain(X))

    def test_then_adapting_again(self, base: nn.Module) -> None:
        _, ours = both(base)
        expected = ours(X)
        vera_fx.unload(ours)
        vera_fx.adapt(ours, vera_fx.VeraConfig(r=4, target_modules=TARGETS))
        fill_adapters(ours)
        assert torch.equal(ours(X), expected)


def tied_llama() -> nn.Module:
    return small_llama(31, tie=True).eval()


class TestTiedEmbeddings:
    """Input and output embeddings are one tensor; an adapter changes one of its two uses."""

    ids = torch.arange(3, 15).reshape(2, 6)

    @pytest.mark.parametrize(
        "fields", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}]
    )
    def test_merging_unties_where_peft_changes_both(self, fields: dict, tmp_path: Path) -> None:
        base = tied_llama()
        fields = {"r": 3, "target_modules": ["q_proj"]} | fields
        config = vera_fx.VeraConfig(**fields)
        ours = vera_fx.adapt(copy.deepcopy(base), config)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**fields)).eval()
        for model in (ours, theirs):
            fill_adapters(model)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.requires_grad and "lm_head.weight" in name.replace(
                        "modules_to_save.default.", ""
                    ):
                        p.mul_(-0.5)
        expected = ours(input_ids=self.ids).logits
        assert_close(expected, theirs(input_ids=self.ids).logits)
        before = ours.model.embed_tokens.weight.clone()
        with pytest.raises(vera_fx.AdapterError, match="tied to 'model.embed_tokens.weight'"):
            vera_fx.merge(ours)
        with pytest.warns(UserWarning, match="lm_head.weight was tied"):
            unloaded = vera_fx.unload(ours, merge=True)

        assert_close(unloaded(input_ids=self.ids).logits, expected, factor=20)
        assert torch.equal(unloaded.model.embed_tokens.weight, before)
        assert unloaded.lm_head.weight is not unloaded.model.embed_tokens.weight
        assert all(p.requires_grad for p in unloaded.parameters())
        assert not unloaded.config.tie_word_embeddings
        unloaded.save_pretrained(tmp_path)
        again = type(base).from_pretrained(tmp_path)
        assert_close(again(input_ids=self.ids).logits, expected, factor=20)
        if fields["target_modules"] == ["lm_head"]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrong = theirs.merge_and_unload()(input_ids=self.ids).logits
            assert_far_apart(wrong, expected)

    def test_both_uses_trained_apart(self) -> None:
        """``modules_to_save`` of both ends trains two copies, as in PEFT."""
        base = tied_llama()
        fields = {
            "r": 3,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens", "lm_head"],
        }
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**fields))
        ours = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(**fields, plan="factored"))
        for model in (theirs, ours):
            fill_adapters(model)
            optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.3)
            for _ in range(2):
                optimizer.zero_grad()
                model(input_ids=self.ids, labels=self.ids).loss.backward()
                optimizer.step()
        assert_close(ours(input_ids=self.ids).logits, theirs(input_ids=self.ids).logits, factor=5)
        summary = vera_fx.parameter_summary(ours)
        assert (summary.trainable, summary.total) == theirs.get_nb_trainable_parameters()
        with vera_fx.disable_adapters(ours):
            assert_close(ours(input_ids=self.ids).logits, base(input_ids=self.ids).logits)
        assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_copies_do_not_start_from_a_merged_base(base: nn.Module) -> None:
    _, ours = both(base, modules_to_save=["head"])
    vera_fx.merge(ours)
    with pytest.raises(vera_fx.AdapterError, match="copies of 'head', and 'default' is merged"):
        vera_fx.add_adapter(ours, "second")
    vera_fx.unmerge(ours)
    vera_fx.add_adapter(ours, "second")
    assert torch.equal(ours.vera.adapter("second").copies.by_path["head"].weight, base.head.weight)


def test_merging_needs_values() -> None:
    with torch.device("meta"):
        model = MLP()
    vera_fx.adapt(model, vera_fx.VeraConfig(r=2, target_modules=["lin0"]))
    with pytest.raises(vera_fx.AdapterError, match="'lin0' is on the meta device"):
        vera_fx.merge(model)
