"""Programs read back: projections drawn again, sites found again, the adapter replaced."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vera_fx
from tests.export.export_models import FORMS, adapted, call_of, eager, extra_of, fixed_of
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference
from tests.models import MLP
from vera_fx.branches.vera.kind import VERA
from vera_fx.export.projections import names_of


def program_of(model: nn.Module, name: str, form: str):
    return vera_fx.export_program(model, kwargs={**call_of(name), **fixed_of(name)}, form=form)


def half_mlp() -> nn.Module:
    config = vera_fx.VeraConfig(r=6, target_modules=["lin0", "lin1"], projection_prng_key=3)
    model = vera_fx.adapt(MLP().bfloat16().eval(), config).eval()
    fill_vectors(model)
    return model


class TestWithoutProjections:
    @pytest.mark.parametrize("form", FORMS[1:])
    def test_they_are_drawn_again(self, form: str, tmp_path: Path) -> None:
        _, model = adapted("mlp", r=64, target_modules=["lin0"])
        vera_fx.add_adapter(  # a larger bank pads the projections of the first
            model, "wide", vera_fx.VeraConfig(r=3, target_modules=["lin1"])
        )
        program = program_of(model, "mlp", form)
        small = vera_fx.save_program(program, tmp_path / "small.pt2", projections=False)
        whole = vera_fx.save_program(program, tmp_path / "whole.pt2")
        saved = 4 * 64 * (20 + 20)
        assert whole.stat().st_size - small.stat().st_size > 0.9 * saved
        assert program.state_dict["vera.vera_A"].shape == (64, 20)

        loaded, extra = vera_fx.load_program(small), extra_of(model, form, call_of("mlp", 4))
        for name in names_of(VERA).values():
            assert torch.equal(loaded.state_dict[name], program.state_dict[name])
        result = loaded.module()(**call_of("mlp", 4), **extra)
        assert_close(result, eager(model, "mlp", call_of("mlp", 4)))
        with pytest.raises(IndexError):  # torch alone does not know where to get them
            torch.export.load(small).module()(**call_of("mlp", 4), **extra)

    def test_half_precision_bases_round_them(self, tmp_path: Path) -> None:
        model, x = half_mlp(), torch.randn(3, 10, dtype=torch.bfloat16)
        program = vera_fx.export_program(model, (x,), form="constant")
        path = vera_fx.save_program(program, tmp_path / "p.pt2", projections=False)
        assert_close(vera_fx.load_program(path).module()(x), model(x).detach())

    def test_others_than_drawn_are_refused(self, tmp_path: Path) -> None:
        _, model = adapted("mlp")
        with torch.no_grad():
            model.vera.projections_of(model.vera.adapter("default")).vera_B.add_(0.01)
        program = program_of(model, "mlp", "constant")
        with pytest.raises(vera_fx.ExportError, match=r"vera\.vera_B as drawn from seed 0 is not"):
            vera_fx.save_program(program, tmp_path / "p.pt2", projections=False)
        assert not list(tmp_path.iterdir())
        vera_fx.save_program(program, tmp_path / "p.pt2")
        merged = program_of(model, "mlp", "merged")
        with pytest.raises(vera_fx.ExportError, match="no projections to leave out"):
            vera_fx.save_program(merged, tmp_path / "m.pt2", projections=False)

    def test_a_hash_that_does_not_match(self, tmp_path: Path, monkeypatch) -> None:
        _, model = adapted("mlp")
        program = program_of(model, "mlp", "constant")
        path = vera_fx.save_program(program, tmp_path / "p.pt2", projections=False)

        def other(*sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
            r, max_in, max_out, _ = sizes
            return torch.zeros(r, max_in), torch.zeros(max_out, r)

        monkeypatch.setattr("vera_fx.branches.vera.parameters.draw_projections", other)
        with pytest.raises(vera_fx.ExportError, match="is not what the program was exported with"):
            vera_fx.load_program(path)


class TestSites:
    @pytest.mark.parametrize("form", FORMS)
    def test_they_are_found_again_after_loading(self, form: str, tmp_path: Path) -> None:
        _, model = adapted("gpt2")
        program = program_of(model, "gpt2", form)
        loaded = vera_fx.load_program(vera_fx.save_program(program, tmp_path / "p.pt2"))
        model(**call_of("gpt2"), **fixed_of("gpt2"))
        sites = vera_fx.explain(model).graphs[0].sites

        assert len(sites) == 6
        assert vera_fx.program_sites(loaded) == sites

    def test_calls_are_told_apart(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.lin(self.lin(x).tanh())

        config = vera_fx.VeraConfig(r=2, target_modules=["lin"])
        model = vera_fx.adapt(Twice(), config).eval()
        program = vera_fx.export_program(model, (torch.ones(3, 4),), form="constant")
        assert vera_fx.program_sites(program) == ("lin", "lin#2")

    def test_programs_of_others(self, tmp_path: Path) -> None:
        program = torch.export.export(nn.Linear(3, 2), (torch.ones(2, 3),))
        with pytest.raises(vera_fx.ExportError, match="does not say what it was made from"):
            vera_fx.program_sites(program)
        with pytest.raises(vera_fx.ExportError, match="does not say what it was made from"):
            vera_fx.replace_adapter(program, tmp_path)


REPLACE = """
import sys, torch, vera_fx
program = vera_fx.load_program(sys.argv[1])
vera_fx.replace_adapter(program, sys.argv[2])
assert "transformers" not in sys.modules
torch.save(program.module()(**torch.load(sys.argv[3])), sys.argv[4])
"""


class TestReplaceAdapter:
    @pytest.mark.parametrize("save_projection", [True, False])
    def test_equals_the_other_adapter(self, tmp_path: Path, save_projection: bool) -> None:
        base, model = adapted("mlp", save_projection=save_projection)
        vera_fx.add_adapter(model, "other")
        fill_vectors(model)
        path = vera_fx.save_program(program_of(model, "mlp", "constant"), tmp_path / "p.pt2")
        vera_fx.save_adapter(model, tmp_path / "other", adapter_name="other")
        call = call_of("mlp", 4)
        torch.save(call, tmp_path / "call.pt")
        first = eager(model, "mlp", call)
        vera_fx.set_adapter(model, "other")
        arguments = [path, tmp_path / "other", tmp_path / "call.pt", tmp_path / "out.pt"]
        subprocess.run([sys.executable, "-c", REPLACE, *arguments], check=True)

        result = torch.load(tmp_path / "out.pt")
        assert_close(result, eager(hook_reference(base, model), "mlp", call))
        assert_far_apart(result, first)

    def test_adapters_that_do_not_fit(self, tmp_path: Path) -> None:
        _, model = adapted("mlp")
        program = program_of(model, "mlp", "constant")
        before = {name: value.clone() for name, value in program.state_dict.items()}
        for name, config, reason in (
            ("rank", {"r": 3}, "has shape"),
            ("seed", {"projection_prng_key": 9}, "other projections"),
            ("targets", {"target_modules": ["lin0"]}, "has no .*lin1"),
        ):
            values = {"r": 6, "target_modules": ["lin0", "lin1"], **config}
            vera_fx.add_adapter(model, name, vera_fx.VeraConfig(**values))
            folder = vera_fx.save_adapter(model, tmp_path / name, adapter_name=name)
            with pytest.raises(vera_fx.ExportError, match=reason):
                vera_fx.replace_adapter(program, folder)
        with pytest.raises(vera_fx.CheckpointError, match="there is no"):
            vera_fx.replace_adapter(program, tmp_path / "missing")
        with pytest.raises(vera_fx.ExportError, match="form 'merged' cannot be replaced"):
            vera_fx.replace_adapter(program_of(model, "mlp", "merged"), tmp_path / "rank")
        assert all(torch.equal(value, before[name]) for name, value in program.state_dict.items())


def test_the_manifest_can_be_read_without_vera_fx(tmp_path: Path) -> None:
    _, model = adapted("mlp")
    path = vera_fx.save_program(program_of(model, "mlp", "input"), tmp_path / "p.pt2")
    extra = {"vera_fx.json": ""}
    torch.export.load(path, extra_files=extra)
    manifest = json.loads(extra["vera_fx.json"])

    assert manifest["form"] == "input"
    assert [target["path"] for target in manifest["targets"]] == ["lin0", "lin1"]
    assert manifest["projections"]["seed"] == 0
