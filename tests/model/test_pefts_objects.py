"""PEFT's own configurations and models, given to vera_fx."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import vera_fx
from tests.helpers import adapted_by_peft, fill_vectors
from tests.models import MLP

X = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))
THEIRS = {"r": 6, "target_modules": ["lin0"], "d_initial": 0.3, "modules_to_save": ["lin1"]}


def base() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


def test_their_configuration_is_taken() -> None:
    config = peft.VeraConfig(**THEIRS, task_type="FEATURE_EXTRACTION")
    model = vera_fx.adapt(base(), config, adapter_name="first")
    vera_fx.add_adapter(model, "second", peft.VeraConfig(r=3, target_modules="lin."))

    ours = vera_fx.VeraConfig(**THEIRS, task_type="FEATURE_EXTRACTION")
    assert model.vera.adapter("first").config == ours
    assert model.vera.adapter("second").config == vera_fx.VeraConfig(r=3, target_modules="lin.")
    assert torch.equal(model(X), vera_fx.adapt(base(), ours)(X))


def test_a_configuration_of_another_method_is_refused() -> None:
    with pytest.raises(vera_fx.ConfigError, match=r"got a peft\.tuners\.lora\.config\.LoraConfig"):
        vera_fx.adapt(base(), peft.LoraConfig(target_modules=["lin0"]))


@pytest.mark.parametrize("make", [peft.VeraConfig, vera_fx.VeraConfig])
def test_inference_mode_freezes_as_in_peft(make: type) -> None:
    config = make(r=6, target_modules=["lin0"], inference_mode=True)
    model = vera_fx.adapt(base(), config)

    assert not any(p.requires_grad for p in model.parameters())
    theirs = peft.get_peft_model(
        base(), peft.VeraConfig(r=6, target_modules=["lin0"], inference_mode=True)
    )
    assert not any(p.requires_grad for p in theirs.parameters())
    vera_fx.add_adapter(model, "trained", make(r=6, target_modules=["lin0"]))
    vera_fx.set_adapter(model, "trained")
    assert any(p.requires_grad for p in model.parameters())


def test_their_models_are_answered_in_their_words() -> None:
    theirs = adapted_by_peft(base(), r=6, target_modules=["lin0"])
    config = vera_fx.VeraConfig(r=4, target_modules=["lin0"])
    for model in (theirs, theirs.base_model, theirs.get_base_model(), nn.Sequential(theirs)):
        with pytest.raises(vera_fx.AdapterError, match=r"PEFT's.*peft_model\.unload\(\)"):
            vera_fx.adapt(model, config)
    plain = theirs.unload()
    assert torch.equal(vera_fx.adapt(plain, config)(X), base()(X))


def test_bookkeeping_fields_are_pefts(tmp_path: Path) -> None:
    theirs = peft.VeraConfig(**THEIRS, base_model_name_or_path="org/base", revision="v2")
    ours = vera_fx.VeraConfig(**THEIRS, base_model_name_or_path="org/base", revision="v2")

    assert ours.peft_type == theirs.peft_type.value
    assert vera_fx.DVoraConfig().peft_type == "DVORA"
    for name, value in theirs.to_dict().items():
        if name != "peft_version":
            mine = ours.to_dict()[name]
            assert (type(value)(mine) if isinstance(mine, tuple) else mine) == value
    model = vera_fx.adapt(base(), ours)
    fill_vectors(model)
    vera_fx.save_adapter(model, tmp_path)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert (read.base_model_name_or_path, read.revision) == ("org/base", "v2")
    again = vera_fx.VeraConfig.from_pretrained(tmp_path, plan="dense")
    assert again == ours.replace(plan="dense")
    assert (again.base_model_name_or_path, again.revision) == ("org/base", "v2")
    with pytest.raises(vera_fx.ConfigError, match="holds a VeraConfig, not a DVoraConfig"):
        vera_fx.DVoraConfig.from_pretrained(tmp_path)
    loaded = vera_fx.load_adapter(copy.deepcopy(base()), tmp_path)
    assert torch.equal(loaded(X), model(X))


def test_a_configuration_is_written_for_peft(tmp_path: Path) -> None:
    fields = {**THEIRS, "modules_to_save": ["head"], "revision": "v2", "d_initial": 0.3}
    ours = vera_fx.VeraConfig(**fields, plan="merged")

    ours.save_pretrained(tmp_path / "new")

    theirs, expected = peft.PeftConfig.from_pretrained(tmp_path / "new"), peft.VeraConfig(**fields)
    assert theirs.to_dict() == expected.to_dict()
    assert vera_fx.VeraConfig.from_pretrained(tmp_path / "new") == ours.replace(plan="auto")
    with pytest.raises(vera_fx.ConfigError, match="exclude_modules"):
        ours.replace(exclude_modules=["x"]).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(vera_fx.CheckpointError, match="cannot be written"):
        ours.save_pretrained(tmp_path / "file")
