"""`to_lora`: the LoRA adapter that computes the same, as PEFT loads it."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
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


def test_diffusers_loads_it_into_a_unet(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    base = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    config = vera_fx.VeraConfig(r=6, target_modules=["to_q", "to_v", "to_out.0"])
    model = vera_fx.adapt(copy.deepcopy(base), config).eval()
    fill_vectors(model)
    vera_fx.to_lora(model, tmp_path)
    theirs, weights = copy.deepcopy(base), "adapter_model.safetensors"
    theirs.load_lora_adapter(tmp_path, prefix="base_model.model", weight_name=weights)

    call = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }
    with torch.no_grad():
        assert_close(theirs(**call).sample, model(**call).sample, factor=5)
        assert_far_apart(theirs(**call).sample, base(**call).sample)


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


class TestRankReduction:
    def test_it_is_the_best_of_its_rank(self, tmp_path: Path) -> None:
        _, _, model = adapted("mlp")
        vera_fx.to_lora(model, tmp_path / "whole")
        errors = vera_fx.lora_errors(model, 2)
        vera_fx.to_lora(model, tmp_path / "small", rank=2)
        whole, small = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "small")
        )
        assert errors.keys() == {"lin0", "lin1"}
        for path, error in errors.items():
            key = f"base_model.model.{path}.lora_"
            update, nearest = (t[f"{key}B.weight"] @ t[f"{key}A.weight"] for t in (whole, small))
            values = torch.linalg.svdvals(update.double())
            assert small[f"{key}A.weight"].shape[0] == 2
            assert error == pytest.approx((values[2:].norm() / values.norm()).item(), rel=1e-4)
            lost = (update - nearest).norm() / update.norm()
            assert lost.item() == pytest.approx(error, rel=1e-4)
            assert 0.01 < error < 0.99
        with safe_open(tmp_path / "small" / "adapter_model.safetensors", "pt") as file:
            assert json.loads(file.metadata()["vera_fx.rank_errors"]) == errors

    def test_peft_loads_it_and_the_whole_rank_is_exact(self, tmp_path: Path) -> None:
        family, base, model = adapted("llama")
        for rank in (6, 3):
            vera_fx.to_lora(model, tmp_path / str(rank), rank=rank)
        assert max(vera_fx.lora_errors(model, 6).values()) < 1e-6
        whole, small = (
            run(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval(), family)
            for name in ("6", "3")
        )
        assert_close(whole, run(model, family), factor=5)
        assert_far_apart(small, whole)

    def test_targets_narrower_than_the_rank(self, tmp_path: Path) -> None:
        base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        config = vera_fx.VeraConfig(r=9, target_modules=["0", "1"])
        model = vera_fx.adapt(copy.deepcopy(base), config).eval()
        fill_vectors(model)
        vera_fx.to_lora(model, tmp_path, rank=5)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        x = torch.randn(4, 3)
        assert_close(theirs(x), model(x), factor=5)

    @pytest.mark.parametrize("rank", [0, 7, True, 2.0])
    def test_ranks_that_are_none(self, rank: object, tmp_path: Path) -> None:
        _, _, model = adapted("mlp")
        with pytest.raises(vera_fx.ConfigError, match="from 1 to the adapter's 6"):
            vera_fx.to_lora(model, tmp_path / "out", rank=rank)
        assert not (tmp_path / "out").exists()


class TestBadInput:
    def test_several_active(self, tmp_path: Path) -> None:
        _, _, model = adapted("mlp")
        vera_fx.add_adapter(model, "second")
        vera_fx.set_adapter(model, ["default", "second"])
        with pytest.raises(vera_fx.AdapterError, match="2 are active"):
            vera_fx.to_lora(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        vera_fx.to_lora(model, tmp_path / "out", adapter_name="second")

    def test_unknown_adapter(self, tmp_path: Path) -> None:
        _, _, model = adapted("mlp")
        with pytest.raises(vera_fx.AdapterError, match="did you mean 'default'"):
            vera_fx.to_lora(model, tmp_path, adapter_name="defautl")

    def test_merged_with_a_head(self, tmp_path: Path) -> None:
        _, _, model = adapted("bert")
        vera_fx.to_lora(model, tmp_path / "before")
        vera_fx.merge(model)
        vera_fx.to_lora(model, tmp_path / "merged")
        name = "adapter_model.safetensors"
        before, merged = (load_file(tmp_path / folder / name) for folder in ("before", "merged"))
        assert before.keys() == merged.keys()
        assert all(torch.equal(before[key], merged[key]) for key in before)

    def test_nothing_is_touched_when_writing_fails(self, tmp_path: Path, monkeypatch) -> None:
        _, _, model = adapted("mlp")
        (tmp_path / "adapter_model.safetensors").write_text("old")

        def fail(*_args, **_kwargs) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("vera_fx.checkpoint.lora.save_file", fail)
        with pytest.raises(vera_fx.CheckpointError, match="No space left"):
            vera_fx.to_lora(model, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["adapter_model.safetensors"]
        assert (tmp_path / "adapter_model.safetensors").read_text() == "old"
