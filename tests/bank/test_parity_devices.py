"""Files of compiled models, models without values, device maps and offloading, beside PEFT 0.21.2."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vera_fx
from tests.checkpoint.parity_files import (
    FIELDS,
    WEIGHTS,
    Layers,
    X,
    disturb,
    layers,
    our_model,
    tiny_llama,
)
from tests.helpers import adapter_vectors, fill_adapters


@pytest.fixture
def base() -> nn.Module:
    return layers()


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
