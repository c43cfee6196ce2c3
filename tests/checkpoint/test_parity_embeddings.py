"""A vocabulary that grew after the base was saved, on disk, against PEFT 0.21.2."""

import copy
import shutil
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vera_fx
from tests.checkpoint.parity_files import FIELDS, WEIGHTS, tiny_llama
from tests.helpers import fill_adapters
from tests.models import MLP


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
