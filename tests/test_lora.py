"""`to_lora`: the LoRA adapter that computes the same, as PEFT loads it."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors, main_output
from tests.models import BY_NAME, MLP, Family


def adapted(name: str, **config) -> tuple[Family, nn.Module, nn.Module]:
    family = BY_NAME[name]
    base = family.build().eval()
    settings = vera_fx.VeraConfig(r=6, **{**family.config, **config})
    model = vera_fx.adapt(copy.deepcopy(base), settings).eval()
    fill_vectors(model)
    with torch.no_grad():
        for _, _, tensor in model.vera.adapter("default").copied_tensors():
            tensor.add_(0.1)
    return family, base, model


def run(model: nn.Module, family: Family) -> torch.Tensor:
    inputs = family.inputs()
    with torch.no_grad():
        plain = family.name in {"mlp", "attention"}
        return main_output(model(*inputs.values()) if plain else model(**inputs))


@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2", "llama", "t5"])
def test_peft_loads_it_with_the_same_outputs(name: str, tmp_path: Path) -> None:
    family, base, model = adapted(name)
    assert vera_fx.to_lora(model, tmp_path) == tmp_path
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()

    assert_close(run(theirs, family), run(model, family), factor=5)
    assert_far_apart(run(theirs, family), run(base, family))


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_trained_biases_go_along(bias: str, tmp_path: Path) -> None:
    family, base, model = adapted("bert", bias=bias)
    vera_fx.to_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()

    assert_close(run(theirs, family), run(model, family), factor=5)


def test_peft_merges_it(tmp_path: Path) -> None:
    family, base, model = adapted("gpt2")
    vera_fx.to_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()

    assert_close(run(theirs.eval(), family), run(model, family), factor=5)


def test_matrices_are_the_definition(tmp_path: Path) -> None:
    _, _, model = adapted("mlp")
    vera_fx.to_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    pair = model.vera.projections_of(model.vera.adapter("default"))
    vectors = model.vera.adapter("default").vectors_at("lin0")

    a = torch.diag(vectors.vera_lambda_d) @ pair.vera_A[:, :10]
    b = torch.diag(vectors.vera_lambda_b) @ pair.vera_B[:20]
    assert_close(tensors["base_model.model.lin0.lora_A.weight"], a.detach())
    assert_close(tensors["base_model.model.lin0.lora_B.weight"], b.detach())
    assert len(tensors) == 4
    assert config["lora_alpha"] == config["r"] == 6


def test_targets_whose_paths_end_other_paths(tmp_path: Path) -> None:
    base = nn.Sequential(MLP(), nn.Linear(7, 10)).eval()
    base.lin0 = nn.Linear(10, 9)  # "0.lin0" ends in its path
    config = vera_fx.VeraConfig(r=3, target_modules="lin0")
    model = vera_fx.adapt(copy.deepcopy(base), config)
    vera_fx.to_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)

    found = [path for path, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert found == ["base_model.model.lin0"]


class TestBadInput:
    def test_several_active(self, tmp_path: Path) -> None:
        _, _, model = adapted("mlp")
        vera_fx.add_adapter(model, "second")
        vera_fx.set_adapter(model, ["default", "second"])
        with pytest.raises(vera_fx.AdapterError, match="2 are active"):
            vera_fx.to_lora(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        vera_fx.to_lora(model, tmp_path / "out", adapter="second")

    def test_unknown_adapter(self, tmp_path: Path) -> None:
        _, _, model = adapted("mlp")
        with pytest.raises(vera_fx.AdapterError, match="did you mean 'default'"):
            vera_fx.to_lora(model, tmp_path, adapter="defautl")

    def test_merged_with_a_head(self, tmp_path: Path) -> None:
        _, _, model = adapted("bert")
        vera_fx.merge(model)
        with pytest.raises(vera_fx.CheckpointError, match="unmerge"):
            vera_fx.to_lora(model, tmp_path)

    def test_nothing_is_touched_when_writing_fails(self, tmp_path: Path, monkeypatch) -> None:
        _, _, model = adapted("mlp")
        (tmp_path / "adapter_model.safetensors").write_text("old")

        def fail(*_args, **_kwargs) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("vera_fx.lora.save_file", fail)
        with pytest.raises(vera_fx.CheckpointError, match="No space left"):
            vera_fx.to_lora(model, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["adapter_model.safetensors"]
        assert (tmp_path / "adapter_model.safetensors").read_text() == "old"
