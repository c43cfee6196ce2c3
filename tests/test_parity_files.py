"""Adapters on disk, against PEFT 0.21.2: every variant both ways, layouts, cards, embeddings."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import vera_fx
from tests.helpers import adapter_vectors, fill_adapters
from tests.models import MLP

X = torch.randn(5, 10, generator=torch.Generator().manual_seed(3))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["lin0", "lin1"]}


class Layers(nn.Module):
    """Linear layers, a Conv1D, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.conv, self.norm = nn.Linear(10, 20), Conv1D(12, 20), nn.LayerNorm(12)
        self.lin1, self.head = nn.Linear(12, 7, bias=False), nn.Linear(7, 3)
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(torch.tanh(self.lin0(x))))
        return self.head(torch.tanh(self.lin1(hidden)))


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Layers().eval()


def peft_model(base: nn.Module, name: str = "default", **fields: Any) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.VeraConfig(**FIELDS | fields), adapter_name=name
        )
    return model.eval()


def our_model(base: nn.Module, name: str = "default", **fields: Any) -> nn.Module:
    config = vera_fx.VeraConfig(plan="factored", **FIELDS | fields)
    return vera_fx.adapt(copy.deepcopy(base), config, adapter_name=name)


def disturb(*models: nn.Module) -> None:
    """Give everything that trains values of its own, the same in both libraries."""
    for model in models:
        fill_adapters(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad and "vera_lambda" not in name:
                    p.add_(torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(p.dtype))


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    values = json.loads((folder / CONFIG).read_text())
    if isinstance(values["target_modules"], list):
        values["target_modules"].sort()
    return load_file(folder / WEIGHTS), values


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

        monkeypatch.setattr("vera_fx.build.draw_projections", never)
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


class TestCompiledKeys:
    """Checkpoints made through ``torch.compile``'s wrapper, which PEFT loads as nothing at all."""

    def test_a_prefix_on_every_key(self, base: nn.Module, tmp_path: Path) -> None:
        model = our_model(base, modules_to_save=["head"])
        disturb(model)
        vera_fx.save_adapter(model, tmp_path)
        state = load_file(tmp_path / WEIGHTS)
        save_file({f"_orig_mod.{k}": v for k, v in state.items()}, tmp_path / WEIGHTS)
        loaded = vera_fx.load_adapter(copy.deepcopy(base), tmp_path, plan="factored")
        assert torch.equal(loaded(X), model(X))
        other = our_model(base, modules_to_save=["head"])
        vera_fx.load_adapter_state_dict(other, {f"_orig_mod.{k}": v for k, v in state.items()})
        assert torch.equal(other(X), model(X))

    def test_pefts_model_of_a_compiled_base(self, base: nn.Module, tmp_path: Path) -> None:
        wrapped = torch.compile(copy.deepcopy(base), backend="eager")
        theirs = peft.get_peft_model(wrapped, peft.VeraConfig(**FIELDS)).eval()
        with torch.no_grad():
            for p in theirs.parameters():
                if p.requires_grad:
                    p.copy_(torch.linspace(-1, 1, p.numel()))
        theirs.save_pretrained(tmp_path)
        assert all("_orig_mod" in key for key in load_file(tmp_path / WEIGHTS) if "lambda" in key)
        loaded = vera_fx.load_adapter(copy.deepcopy(base), tmp_path, plan="factored")
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(loaded(X), theirs(X))

    def test_a_compiled_part_leaves_no_mark_on_the_file(
        self, base: nn.Module, tmp_path: Path
    ) -> None:
        model = nn.Sequential(torch.compile(copy.deepcopy(base), backend="eager"), nn.Linear(3, 2))
        vera_fx.adapt(model, vera_fx.VeraConfig(**FIELDS, plan="factored"))
        fill_adapters(model)
        vera_fx.save_adapter(model, tmp_path)
        assert not any("_orig_mod" in key for key in load_file(tmp_path / WEIGHTS))
        plain = nn.Sequential(copy.deepcopy(base), copy.deepcopy(model[1]))
        loaded = vera_fx.load_adapter(plain, tmp_path, plan="factored")
        assert torch.equal(loaded(X), model(X))

    def test_the_wrapper_itself_is_refused(self, base: nn.Module) -> None:
        config = vera_fx.VeraConfig(**FIELDS)
        with pytest.raises(vera_fx.AdapterError, match="adapt the model that was given to"):
            vera_fx.adapt(torch.compile(copy.deepcopy(base), backend="eager"), config)


class TestDevices:
    def test_an_adapter_is_ready_before_the_base_has_values(
        self, base: nn.Module, tmp_path: Path
    ) -> None:
        model = our_model(base, modules_to_save=["head"], bias="vera_only")
        disturb(model)
        expected = model(X)
        vera_fx.save_adapter(model, tmp_path)
        with torch.device("meta"):
            empty = Layers()
        loaded = vera_fx.load_adapter(empty, tmp_path, plan="factored")
        assert not any(p.is_meta for p in adapter_vectors(loaded).values())
        vera_fx.save_adapter(loaded, tmp_path / "again")
        missing = loaded.load_state_dict(base.state_dict(), assign=True, strict=False)
        assert all(key.startswith("vera.") for key in missing.missing_keys)
        assert torch.equal(loaded(X), expected)
        again = vera_fx.load_adapter(copy.deepcopy(base), tmp_path / "again", plan="factored")
        assert torch.equal(again(X), expected)

    def test_adapting_a_model_without_values(self, base: nn.Module) -> None:
        with torch.device("meta"):
            empty = Layers()
        model = vera_fx.adapt(empty, vera_fx.VeraConfig(**FIELDS, plan="factored"))
        fill_adapters(model)
        model.load_state_dict(base.state_dict(), assign=True, strict=False)
        expected = our_model(base)
        fill_adapters(expected)
        assert torch.equal(model.eval()(X), expected(X))
        assert not any(p.requires_grad for n, p in model.named_parameters() if "vera." not in n)

    @pytest.mark.parametrize("fields", [{"modules_to_save": ["head"]}, {"bias": "all"}])
    def test_trained_copies_need_values(self, fields: dict) -> None:
        with torch.device("meta"):
            empty = Layers()
        with pytest.raises(vera_fx.TargetError, match="is on the meta device.*load the weights"):
            vera_fx.adapt(empty, vera_fx.VeraConfig(**FIELDS, **fields))
        assert type(empty) is Layers

    def test_calling_a_model_without_values(self) -> None:
        with torch.device("meta"):
            empty = Layers()
        model = vera_fx.adapt(empty, vera_fx.VeraConfig(**FIELDS))
        with pytest.raises(vera_fx.CaptureError, match="meta"):
            model(X)

    def test_a_device_map_of_one_device(self, tmp_path: Path) -> None:
        base = tiny_llama(tmp_path / "base")
        mapped = type(base).from_pretrained(tmp_path / "base", device_map={"": "cpu"}).eval()
        config = vera_fx.VeraConfig(r=2, target_modules=["q_proj"], plan="factored")
        models = [vera_fx.adapt(model, config) for model in (mapped, base)]
        for model in models:
            fill_adapters(model)
        ids = torch.arange(6).reshape(2, 3)
        assert torch.equal(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)

    def test_offloaded_models_are_refused(self, tmp_path: Path) -> None:
        import accelerate

        whole, part = Layers(), Layers()
        accelerate.cpu_offload(whole, execution_device=torch.device("cpu"))
        accelerate.cpu_offload(part.lin0, execution_device=torch.device("cpu"))
        for model, message in (
            (whole, "by a wrapper such as accelerate's"),
            (part, "'lin0' is offloaded by accelerate"),
        ):
            with pytest.raises(vera_fx.VeraFxError, match=message):
                vera_fx.adapt(model, vera_fx.VeraConfig(**FIELDS))


def tiny_llama(folder: Path, *, tie: bool = False, vocabulary: int = 23) -> nn.Module:
    """A Llama that was saved to ``folder`` and loaded from there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("tie", [True, False])
class TestEmbeddings:
    """A vocabulary that grew after the base was saved."""

    ids = torch.arange(20, 26).reshape(2, 3)
    fields = MappingProxyType({"r": 2, "target_modules": ["q_proj", "v_proj"]})

    def grown(self, folder: Path, tie: bool, seed: int) -> nn.Module:
        model = tiny_llama(folder / "base", tie=tie)
        torch.manual_seed(seed)
        model.resize_token_embeddings(26)
        with torch.no_grad():
            model.get_input_embeddings().weight[23:].normal_()
            model.get_output_embeddings().weight[23:].normal_()
        return model

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=self.ids % model.config.vocab_size).logits

    @pytest.fixture
    def folders(self, tie: bool, tmp_path: Path) -> tuple[Path, Tensor]:
        """One adapter on one grown base, saved by both libraries."""
        trained = self.grown(tmp_path, tie, 1)
        theirs = peft.get_peft_model(copy.deepcopy(trained), peft.VeraConfig(**self.fields)).eval()
        ours = vera_fx.adapt(trained, vera_fx.VeraConfig(**self.fields, plan="factored"))
        fill_adapters(theirs), fill_adapters(ours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.save_pretrained(tmp_path / "theirs")
        vera_fx.save_adapter(ours, tmp_path / "ours")
        return tmp_path, self.logits(ours)

    def test_go_along_and_come_back(self, folders: tuple[Path, Tensor], tie: bool) -> None:
        folder, expected = folders
        states = [load_file(folder / who / WEIGHTS) for who in ("theirs", "ours")]
        assert states[0].keys() == states[1].keys()
        assert sum("embed_tokens" in key or "lm_head" in key for key in states[1]) == 2
        for who in ("theirs", "ours"):
            other = self.grown(folder, tie, 2)
            plain = self.logits(other)
            weight = other.get_input_embeddings().weight.clone()
            loaded = vera_fx.load_adapter(copy.deepcopy(other), folder / who, plan="factored")
            assert torch.equal(self.logits(loaded), expected)
            with vera_fx.disable_adapters(loaded):  # PEFT has overwritten the base by now
                torch.testing.assert_close(self.logits(loaded), plain, rtol=1e-6, atol=1e-6)
            assert torch.equal(loaded.get_input_embeddings().weight, weight)
            reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(other), folder / who)
            assert torch.equal(self.logits(reloaded), expected)

    @pytest.mark.parametrize("kept", ["embed_tokens", "lm_head"])
    def test_one_of_two_tied_ones_stands_for_both(
        self, folders: tuple[Path, Tensor], tie: bool, kept: str
    ) -> None:
        """A file may hold shared memory once; PEFT then overwrites the one tensor that both are."""
        if not tie:
            pytest.skip("two tensors")
        folder, expected = folders
        path = folder / "ours" / WEIGHTS
        state = load_file(path)
        both = {key for key in state if "embed_tokens" in key or "lm_head" in key}
        save_file({k: v for k, v in state.items() if k not in both or kept in k}, path)
        other = self.grown(folder, tie, 2)
        loaded = vera_fx.load_adapter(copy.deepcopy(other), folder / "ours", plan="factored")
        assert torch.equal(self.logits(loaded), expected)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(other), folder / "ours")
        assert torch.equal(self.logits(theirs), expected)

    def test_are_frozen_saved_again_and_merged(
        self, folders: tuple[Path, Tensor], tie: bool
    ) -> None:
        folder, expected = folders
        other = self.grown(folder, tie, 2)
        loaded = vera_fx.load_adapter(copy.deepcopy(other), folder / "theirs", trainable=True)
        assert {n.rpartition(".")[2] for n, p in loaded.named_parameters() if p.requires_grad} == {
            "vera_lambda_d",
            "vera_lambda_b",
        }
        vera_fx.save_adapter(loaded, folder / "again", save_embedding_layers=False)
        states = [load_file(folder / who / WEIGHTS) for who in ("theirs", "again")]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
        for _ in range(2):
            vera_fx.merge(loaded, keep_base=True)
            torch.testing.assert_close(self.logits(loaded), expected, rtol=1e-4, atol=1e-5)
            vera_fx.unmerge(loaded)
            assert all(torch.equal(p, before[n]) for n, p in loaded.named_parameters())
        torch.testing.assert_close(self.logits(loaded), expected, rtol=1e-5, atol=1e-6)
        merged = vera_fx.unload(loaded, merge=True)
        torch.testing.assert_close(self.logits(merged), expected, rtol=1e-4, atol=1e-5)

    def test_of_two_adapters_do_not_mix(self, folders: tuple[Path, Tensor], tie: bool) -> None:
        folder, first = folders
        trained = self.grown(folder, tie, 3)
        vera_fx.adapt(trained, vera_fx.VeraConfig(**self.fields, plan="factored"))
        fill_adapters(trained)
        vera_fx.save_adapter(trained, folder / "second")
        second = self.logits(trained)
        both = vera_fx.load_adapter(self.grown(folder, tie, 2), folder / "ours", adapter_name="a")
        vera_fx.load_adapter(both, folder / "second", adapter_name="b")
        vera_fx.load_adapter(both, folder / "ours", adapter_name="c")
        for name, expected in (("b", second), ("a", first), ("b", second), ("c", first)):
            vera_fx.set_adapter(both, name)
            torch.testing.assert_close(self.logits(both), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(vera_fx.AdapterError, match="'a' and 'b' cannot be active together"):
            vera_fx.set_adapter(both, ["a", "b"])
        vera_fx.set_adapter(both, ["a", "c"])  # their embeddings are equal
        assert torch.isfinite(self.logits(both)).all()
        with pytest.raises(vera_fx.TargetError, match="cannot take another value for every row"):
            both(input_ids=self.ids, adapter_names=["a", "b"])

    def test_of_another_vocabulary_are_refused(
        self, folders: tuple[Path, Tensor], tie: bool
    ) -> None:
        folder, _ = folders
        small = tiny_llama(folder / "base", tie=tie)
        for who in ("theirs", "ours"):
            with pytest.raises(vera_fx.CheckpointError, match=r"resize_token_embeddings\(26\)"):
                vera_fx.load_adapter(small, folder / who)
        assert not hasattr(small, "vera")

    def test_choice(self, tie: bool, tmp_path: Path) -> None:
        model = tiny_llama(tmp_path / "base", tie=tie)
        vera_fx.adapt(model, vera_fx.VeraConfig(**self.fields))

        def count(choice: Any) -> int:
            folder = vera_fx.save_adapter(model, tmp_path / "out", save_embedding_layers=choice)
            state = load_file(folder / WEIGHTS)
            return sum("embed_tokens" in key or "lm_head" in key for key in state)

        assert (count("auto"), count(True), count(False)) == (0, 2, 0)
        with pytest.raises(vera_fx.ConfigError, match="must be True, False or 'auto'"):
            count("yes")
        shutil.rmtree(tmp_path / "base")
        with pytest.warns(UserWarning, match="is not on this machine"):
            assert count("auto") == 0
        plain = vera_fx.adapt(MLP(), vera_fx.VeraConfig(**FIELDS))
        with pytest.raises(vera_fx.ConfigError, match="MLP has no get_input_embeddings"):
            vera_fx.save_adapter(plain, tmp_path / "plain", save_embedding_layers=True)

    def test_a_targeted_head_brings_its_weight(self, tie: bool, tmp_path: Path) -> None:
        """PEFT writes the whole weight of a targeted ``lm_head``; ours knows it from the base."""
        model = tiny_llama(tmp_path / "base", tie=tie)
        fields = {"r": 2, "target_modules": ["q_proj", "lm_head"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(copy.deepcopy(model), peft.VeraConfig(**fields)).eval()
            fill_adapters(theirs)
            theirs.save_pretrained(tmp_path / "theirs")
        key = "base_model.model.lm_head.base_layer.weight"
        assert key in load_file(tmp_path / "theirs" / WEIGHTS)
        loaded = vera_fx.load_adapter(copy.deepcopy(model), tmp_path / "theirs", plan="factored")
        assert torch.equal(self.logits(loaded), self.logits(theirs))
        vera_fx.save_adapter(loaded, tmp_path / "ours")
        assert key not in load_file(tmp_path / "ours" / WEIGHTS)
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        with pytest.raises(vera_fx.CheckpointError, match="'lm_head'.*differs"):
            vera_fx.load_adapter(model, tmp_path / "theirs")
