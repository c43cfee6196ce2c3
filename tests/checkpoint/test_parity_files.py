"""Adapters on disk, against PEFT 0.21.2: every variant both ways, layouts, cards."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

import vera_fx
from tests.checkpoint.parity_files import (
    FIELDS,
    WEIGHTS,
    X,
    contents,
    disturb,
    layers,
    our_model,
    peft_model,
    tiny_llama,
)
from tests.helpers import adapter_vectors, fill_adapters


@pytest.fixture
def base() -> nn.Module:
    return layers()


VARIANTS: dict[str, dict[str, Any]] = {
    "vectors": {},
    "head": {"modules_to_save": ["head"]},
    "bias all": {"bias": "all"},
    "bias of targets": {"bias": "vera_only"},
    "head and all biases": {"modules_to_save": ["head"], "bias": "all"},
    "conv1d": {"target_modules": ["conv"]},
    "conv1d and linear": {"target_modules": ["lin0", "conv", "lin1"], "bias": "vera_only"},
    "regex": {"target_modules": r"lin[01]"},
    "all-linear": {"target_modules": "all-linear"},
    "dropout": {"vera_dropout": 0.1, "d_initial": 0.2, "projection_prng_key": 9},
    "drawn projections": {"save_projection": False},
    "random start": {"init_weights": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:.*no projections and no hash")
def test_every_variant_travels_both_ways(base: nn.Module, variant: str, tmp_path: Path) -> None:
    fields = VARIANTS[variant]
    theirs, ours = peft_model(base, **fields), our_model(base, **fields)
    disturb(theirs, ours)
    expected = ours(X)
    assert torch.equal(expected, theirs(X))
    assert not torch.allclose(expected, base(X), atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    vera_fx.save_adapter(ours, tmp_path / "ours")

    (their_state, their_values), (our_state, our_values) = (
        contents(tmp_path / who) for who in ("theirs", "ours")
    )
    assert our_values == their_values
    strays = {k for k in their_state if "original_module" in k or "modules_to_save" in k}
    assert our_state.keys() == their_state.keys() - strays
    for key, value in our_state.items():
        assert torch.equal(value, their_state[key]), key
    loaded = vera_fx.load_adapter(
        copy.deepcopy(base), tmp_path / "theirs", adapter_name="mine", plan="factored"
    )
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", "other")
    assert torch.equal(loaded(X), expected)
    assert torch.equal(reloaded(X), expected)


def test_exclusions_travel_as_what_they_leave(base: nn.Module, tmp_path: Path) -> None:
    """PEFT knows no ``exclude_modules``, and takes a full path for the end of others, too."""
    model = nn.ModuleDict({"lin0": nn.Linear(10, 10), "inner": copy.deepcopy(base)})
    fields = {"r": 3, "target_modules": "all-linear", "exclude_modules": r"inner\.lin0|.*head"}
    ours = vera_fx.adapt(model, vera_fx.VeraConfig(**fields))
    fill_adapters(ours)
    vera_fx.save_adapter(ours, tmp_path)
    fresh = nn.ModuleDict({"lin0": nn.Linear(10, 10), "inner": copy.deepcopy(base)})
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)
    again = vera_fx.load_adapter(fresh, tmp_path)
    expected = adapter_vectors(ours)
    assert {path for _, path, _ in expected} == {"lin0", "inner.conv", "inner.lin1"}
    for model in (theirs, again):
        assert adapter_vectors(model).keys() == expected.keys()
        assert all(torch.equal(v, expected[key]) for key, v in adapter_vectors(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_both_ways(
    base: nn.Module, dtype: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    base, x = base.to(dtype), X.to(dtype)
    theirs, ours = (
        peft_model(base, modules_to_save=["head"]),
        our_model(base, modules_to_save=["head"]),
    )
    disturb(theirs, ours)
    theirs.save_pretrained(tmp_path / "theirs")
    vera_fx.save_adapter(ours, tmp_path / "ours")
    cast = {"autocast_adapter_dtype": autocast}
    for who in ("theirs", "ours"):
        loaded = vera_fx.load_adapter(copy.deepcopy(base), tmp_path / who, plan="factored", **cast)
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / who, **cast)
        assert loaded(x).dtype == dtype
        assert torch.equal(loaded(x), reloaded(x))
        if autocast:
            assert torch.equal(loaded(x), ours(x))


@pytest.mark.filterwarnings("ignore:.*no projections and no hash")
@pytest.mark.parametrize("save_projection", [True, False])
def test_several_adapters_in_pefts_folders(
    base: nn.Module, save_projection: bool, tmp_path: Path
) -> None:
    """ "default" in the folder itself, the others below it."""
    fields = {"save_projection": save_projection}
    theirs, ours = peft_model(base, **fields), our_model(base, **fields)
    for name in ("second", "third"):
        theirs.add_adapter(name, peft.VeraConfig(**FIELDS | fields))
        vera_fx.add_adapter(ours, name)
    disturb(theirs, ours)
    theirs.save_pretrained(tmp_path / "theirs")
    written = vera_fx.save_adapters(ours, tmp_path / "ours")

    top = tmp_path / "ours"
    assert written == {"default": top, "second": top / "second", "third": top / "third"}
    for folder in ("", "second", "third"):
        pairs = [contents(tmp_path / who / folder) for who in ("theirs", "ours")]
        assert pairs[0][1] == pairs[1][1]
        assert pairs[0][0].keys() == pairs[1][0].keys()
        assert all(torch.equal(value, pairs[1][0][key]) for key, value in pairs[0][0].items())
    for who in ("theirs", "ours"):
        loaded = vera_fx.load_adapter(copy.deepcopy(base), tmp_path / who, plan="factored")
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / who)
        for name in ("second", "third"):
            vera_fx.load_adapter(loaded, tmp_path / who / name, adapter_name=name, plan="factored")
            reloaded.load_adapter(tmp_path / who / name, name)
        for name in ("default", "third", "second"):
            for model in (loaded, ours):
                vera_fx.set_adapter(model, name)
            reloaded.set_adapter(name)
            assert torch.equal(loaded(X), ours(X))
            assert torch.equal(reloaded(X), ours(X))


def test_selected_adapters(base: nn.Module, tmp_path: Path) -> None:
    theirs, ours = peft_model(base, "a"), our_model(base, "a")
    theirs.add_adapter("b", peft.VeraConfig(**FIELDS)), vera_fx.add_adapter(ours, "b")
    assert vera_fx.save_adapters(ours, tmp_path / "ours", ["b"]) == {"b": tmp_path / "ours" / "b"}
    assert not (tmp_path / "ours" / "a").exists()
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        theirs.save_pretrained(tmp_path / "theirs", selected_adapters=["b", "c"])
    for names, message in (
        (["b", "c"], "called 'c'"),
        ("b", "must be a list"),
        ([], "must be a list"),
    ):
        with pytest.raises(vera_fx.AdapterError, match=message):
            vera_fx.save_adapters(ours, tmp_path / "none", names)
    assert not (tmp_path / "none").exists()


def test_loaded_files_keep_what_they_said_of_the_base(base: nn.Module, tmp_path: Path) -> None:
    theirs = peft_model(base)
    theirs.peft_config["default"].revision = "abc"
    theirs.peft_config["default"].base_model_name_or_path = "some/base"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = vera_fx.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    vera_fx.save_adapter(loaded, tmp_path / "ours")
    values = [contents(tmp_path / who)[1] for who in ("theirs", "ours")]
    assert values[0] == values[1]
    assert values[1]["revision"] == "abc"


class TestCard:
    def test_has_the_fields_of_pefts(self, tmp_path: Path) -> None:
        model = tiny_llama(tmp_path / "base")
        fields = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.VeraConfig(**fields))
        theirs.save_pretrained(tmp_path / "theirs")
        ours = vera_fx.adapt(copy.deepcopy(model), vera_fx.VeraConfig(**fields))
        vera_fx.save_adapter(ours, tmp_path / "ours")

        cards = [ModelCard.load(tmp_path / who / "README.md") for who in ("theirs", "ours")]
        assert cards[1].data.to_dict() == cards[0].data.to_dict()
        assert cards[1].data.pipeline_tag == "text-generation"
        assert "- PEFT 0.21.2" in cards[1].text
        assert "| rank | 2 |" in cards[1].text

    def test_of_a_plain_module(self, base: nn.Module, tmp_path: Path) -> None:
        vera_fx.save_adapter(our_model(base), tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.to_dict() == {"library_name": "peft"}
        assert "`Layers`" in card.text

    def test_one_of_the_user_stays(self, base: nn.Module, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("mine")
        vera_fx.save_adapter(our_model(base), tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"

    def test_peft_can_go_on_with_ours(self, base: nn.Module, tmp_path: Path) -> None:
        vera_fx.save_adapter(our_model(base), tmp_path)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        theirs.save_pretrained(tmp_path)
        assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


class TestLoading:
    @pytest.fixture
    def saved(self, base: nn.Module, tmp_path: Path) -> Path:
        model = our_model(base, modules_to_save=["head"], init_weights=False)
        disturb(model)
        return vera_fx.save_adapter(model, tmp_path / "saved")

    def test_makes_nothing_that_it_would_overwrite(
        self, base: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """PEFT's ``low_cpu_mem_usage``, without asking: neither projections nor vectors are drawn."""

        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("drawn")

        monkeypatch.setattr("vera_fx.branches.vera.parameters.draw_projections", never)
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        loaded = vera_fx.load_adapter(copy.deepcopy(base), saved, trainable=True)
        assert torch.equal(torch.rand(3), expected)
        assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
        assert vera_fx.parameter_summary(loaded).trainable == 2 * 4 + 20 + 7 + 24

    def test_is_independent_of_the_file(self, base: nn.Module, saved: Path) -> None:
        loaded = vera_fx.load_adapter(copy.deepcopy(base), saved)
        before = {k: v.clone() for k, v in vera_fx.adapter_state_dict(loaded).items()}
        with (saved / WEIGHTS).open("r+b") as file:  # in place, as other writers do
            file.write(bytes((saved / WEIGHTS).stat().st_size))
        assert before
        for key, value in vera_fx.adapter_state_dict(loaded).items():
            assert torch.equal(value, before[key]), key

    def test_peft_rounds_where_it_saves_memory(self, base: nn.Module, tmp_path: Path) -> None:
        """``low_cpu_mem_usage=True`` sends trained vectors through the base's bfloat16 in PEFT."""
        half = base.bfloat16()
        theirs = peft_model(half)
        disturb(theirs)
        theirs.save_pretrained(tmp_path)
        lean = peft.PeftModel.from_pretrained(copy.deepcopy(half), tmp_path, low_cpu_mem_usage=True)
        loaded = vera_fx.load_adapter(copy.deepcopy(half), tmp_path)
        for key, value in adapter_vectors(theirs).items():
            assert torch.equal(adapter_vectors(loaded)[key], value), key
        exact = [
            torch.equal(v, adapter_vectors(lean)[k]) for k, v in adapter_vectors(theirs).items()
        ]
        assert not all(exact)

    def test_puts_the_model_into_eval_mode_for_inference(
        self, base: nn.Module, saved: Path
    ) -> None:
        for trainable in (True, False):
            theirs = peft.PeftModel.from_pretrained(
                copy.deepcopy(base).train(), saved, is_trainable=trainable
            )
            ours = vera_fx.load_adapter(copy.deepcopy(base).train(), saved, trainable=trainable)
            assert ours.training == theirs.base_model.model.training == trainable
            assert {p.requires_grad for p in adapter_vectors(ours).values()} == {trainable}

    def test_beside_one_that_trains_leaves_the_mode(self, base: nn.Module, saved: Path) -> None:
        """PEFT switches the whole model to eval mode in the middle of a training."""
        theirs, ours = peft_model(base, "a").train(), our_model(base, "a").train()
        theirs.load_adapter(saved, "b"), vera_fx.load_adapter(ours, saved, adapter_name="b")
        assert not theirs.training
        assert ours.training
        assert vera_fx.active_adapters(ours) == ["a"]

    def test_changed_projections_come_back(self, base: nn.Module, tmp_path: Path) -> None:
        model = our_model(base)
        disturb(model)
        with torch.no_grad():
            for tensor in model.vera.projections.buffers():
                tensor.add_(1)
        expected = model(X)
        vera_fx.save_adapter(model, tmp_path)
        assert torch.equal(
            vera_fx.load_adapter(copy.deepcopy(base), tmp_path, plan="factored")(X), expected
        )
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert torch.equal(theirs(X), expected)

    def test_projections_are_saved_if_any_owner_wants_it(self, base: nn.Module) -> None:
        model = our_model(base, "a", save_projection=False)
        assert not any("vera_A" in key for key in model.state_dict())
        vera_fx.add_adapter(model, "b", vera_fx.VeraConfig(**FIELDS, save_projection=True))
        assert sum("vera_A" in key for key in model.state_dict()) == 1
