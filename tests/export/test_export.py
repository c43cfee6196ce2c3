"""`export_program`: programs of ATen operators that run where vera_fx is unknown."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.export.export_models import FORMS, adapted, call_of, eager, extra_of, fixed_of
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference
from tests.models import MLP

RUNNER = """
import sys, torch
folder = sys.argv[1]
results = {}
for form in ("merged", "constant", "input", "rows"):
    program = torch.export.load(f"{folder}/{form}.pt2").module()
    calls = torch.load(f"{folder}/{form}.pt")
    found = [program(**call) for call in calls]
    results[form] = [r["logits"] if isinstance(r, dict) else r for r in found]
unwanted = {"vera_fx", "transformers", "peft", "safetensors"} & set(sys.modules)
assert not unwanted, unwanted
torch.save(results, f"{folder}/results.pt")
"""


def run_elsewhere(folder: Path) -> dict[str, list[Tensor]]:
    """Run the programs in a process that has imported nothing but torch."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUNNER, folder],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("name", ["mlp", "llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_runs_where_only_torch_is_imported(name: str, tmp_path: Path) -> None:
    base, model = adapted(name)
    example = {**call_of(name), **fixed_of(name)}
    calls = [call_of(name, batch, length) for batch, length in ((3, 7), (2, 9), (5, 4))]
    for form in FORMS:
        program = vera_fx.export_program(model, kwargs=example, form=form)
        vera_fx.save_program(program, tmp_path / f"{form}.pt2")
        torch.save([call | extra_of(model, form, call) for call in calls], tmp_path / f"{form}.pt")

    oracle = hook_reference(base, model) if name != "bert" else model  # bert's head is trained
    for results in run_elsewhere(tmp_path).values():
        for call, result in zip(calls, results, strict=True):
            assert_close(result, eager(oracle, name, call), factor=5)
            assert_far_apart(result, eager(base, name, call))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "vit", "opt")]


@pytest.mark.parametrize("name", ["gpt2", *SLOW])
def test_families(name: str) -> None:
    base, model = adapted(name)
    for form in FORMS:
        example = {**call_of(name), **fixed_of(name)}
        run = vera_fx.export_program(model, kwargs=example, form=form).module()
        for batch, length in ((3, 7), (2, 9)):
            call = call_of(name, batch, length)
            result = run(**call, **extra_of(model, form, call))["logits"]
            assert_close(result, eager(hook_reference(base, model), name, call), factor=5)
            assert_far_apart(result, eager(base, name, call))


@pytest.mark.parametrize("form", FORMS)
def test_programs_hold_torch_operators_only(form: str) -> None:
    _, model = adapted("gpt2")
    program = vera_fx.export_program(
        model, kwargs={**call_of("gpt2"), **fixed_of("gpt2")}, form=form
    )
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]

    assert targets
    assert {t.__module__ for t in targets} <= {"torch._ops.aten", "_operator"}
    branches = any("vera" in name for name in program.state_dict)
    assert branches == (form != "merged")


def test_one_program_serves_every_adapter() -> None:
    base, model = adapted("mlp")
    program = vera_fx.export_program(model, kwargs=call_of("mlp"), form="input")
    vera_fx.add_adapter(model, "other")
    fill_vectors(model)
    x = call_of("mlp", 4)["x"]
    results = []
    for name in ("default", "other"):
        vera_fx.set_adapter(model, name)
        vectors = vera_fx.program_vectors(model, name, program)
        results.append(program.module()(x=x, vectors=vectors))
        assert_close(results[-1], eager(hook_reference(base, model), "mlp", {"x": x}))
    with torch.no_grad():
        model.vera.adapter("other").vectors_at("lin0").vera_lambda_b.mul_(2)
    changed = program.module()(x=x, vectors=vera_fx.program_vectors(model, "other"))
    assert_far_apart(changed, results[1])


def test_a_saved_adapter_is_the_input_as_it_is(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, model = adapted("mlp", save_projection=False)
    program = vera_fx.export_program(model, kwargs=call_of("mlp"), form="input")
    vectors = load_file(vera_fx.save_adapter(model, tmp_path) / "adapter_model.safetensors")

    result = program.module()(**call_of("mlp"), vectors=vectors)
    assert_close(result, eager(model, "mlp", call_of("mlp")))


@pytest.mark.parametrize("form", FORMS)
def test_saved_modules_and_biases_go_along(form: str) -> None:
    base, model = adapted("bert", bias="all", modules_to_save=["pooler"])
    program = vera_fx.export_program(model, kwargs=call_of("bert"), form=form)
    extra = extra_of(model, form, call_of("bert"))
    result = program.module()(**call_of("bert"), **extra)["logits"]

    assert_close(result, eager(model, "bert", call_of("bert")), factor=5)
    assert_far_apart(result, eager(base, "bert", call_of("bert")))


def test_a_program_is_a_snapshot() -> None:
    _, model = adapted("mlp")
    call = call_of("mlp")
    programs = [vera_fx.export_program(model, kwargs=call, form=form) for form in FORMS[:2]]
    expected = eager(model, "mlp", call)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for program in programs:
        assert_close(program.module()(**call), expected)
    assert_far_apart(eager(model, "mlp", call), expected)


def test_positional_and_inactive() -> None:
    base, model = adapted("mlp")
    vera_fx.add_adapter(model, "second")
    fill_vectors(model)
    program = vera_fx.export_program(model, (call_of("mlp")["x"],), adapter_name="second")
    assert vera_fx.active_adapters(model) == ["default"]
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("second" not in name for name in trains)
    vera_fx.set_adapter(model, "second")
    x = call_of("mlp", 9)["x"]
    assert_close(program.module()(x), eager(hook_reference(base, model), "mlp", {"x": x}))


class OnlyPairs(nn.Module):
    """Control flow on a size, which leaves no trace in the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) if x.shape[0] % 2 == 0 else self.lin(x) * 2


def test_sizes_that_tracing_has_excluded_are_refused() -> None:
    config = vera_fx.VeraConfig(r=2, target_modules=["lin"])
    model = vera_fx.adapt(OnlyPairs(), config).eval()
    fill_vectors(model)
    program = vera_fx.export_program(model, (torch.randn(4, 5),)).module()

    assert_close(program(torch.ones(6, 5)), model(torch.ones(6, 5)).detach())
    with pytest.raises((RuntimeError, AssertionError)):
        program(torch.ones(5, 5))


def test_dynamic_shapes_are_torch_exports_own() -> None:
    _, model = adapted("mlp")
    call = call_of("mlp")
    fixed = vera_fx.export_program(model, kwargs=call, dynamic_shapes=None).module()
    assert_close(fixed(**call), eager(model, "mlp", call))
    with pytest.raises((RuntimeError, AssertionError)):
        fixed(**call_of("mlp", 4))
    batch = torch.export.Dim("batch", min=2, max=8)
    program = vera_fx.export_program(model, kwargs=call, dynamic_shapes={"x": {0: batch}})
    assert [str(v) for v in program.range_constraints.values()] == ["VR[2, 8]"]
    with pytest.raises(vera_fx.ExportError, match="refuses"):
        vera_fx.export_program(model, kwargs=call, dynamic_shapes={"x": {1: batch}})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(form: str, dtype: torch.dtype) -> None:
    config = vera_fx.VeraConfig(r=6, target_modules=["lin0", "lin1"])
    model = vera_fx.adapt(MLP().to(dtype).eval(), config).eval()
    fill_vectors(model)
    x = torch.randn(4, 10, dtype=dtype)
    program = vera_fx.export_program(model, (x,), form=form).module()
    extra = extra_of(model, form, {"x": x})
    assert_close(program(x, **extra), model(x).detach())


class TestBadInput:
    def test_forms(self) -> None:
        _, model = adapted("mlp")
        with pytest.raises(vera_fx.ExportError, match="did you mean 'merged'"):
            vera_fx.export_program(model, kwargs=call_of("mlp"), form="merge")

    def test_state_of_the_model(self) -> None:
        _, model = adapted("mlp")
        model.drop.train()
        with pytest.raises(vera_fx.ExportError, match="drop is in train mode"):
            vera_fx.export_program(model, kwargs=call_of("mlp"))
        vera_fx.merge(model.eval())
        for form in FORMS:
            with pytest.raises(vera_fx.ExportError, match="unmerge"):
                vera_fx.export_program(model, kwargs=call_of("mlp"), form=form)
        with pytest.raises(vera_fx.AdapterError, match="not adapted"):
            vera_fx.export_program(MLP(), kwargs=call_of("mlp"))

    def test_several_adapters_of_mixed_rank(self) -> None:
        _, model = adapted("mlp")
        config = vera_fx.VeraConfig(r=3, target_modules=["lin0", "lin1"])
        vera_fx.add_adapter(model, "small", config)
        program = vera_fx.export_program(model, kwargs=call_of("mlp"), form="input")
        with pytest.raises(vera_fx.ExportError, match=r"shape \(3,\), the program takes \(6,\)"):
            vera_fx.program_vectors(model, "small", program)
        vera_fx.set_adapter(model, ["default", "small"])
        with pytest.raises(vera_fx.AdapterError, match="2 are active"):
            vera_fx.export_program(model, kwargs=call_of("mlp"))

    def test_a_cache(self) -> None:
        from transformers import DynamicCache

        _, model = adapted("llama")
        call = {**call_of("llama"), "past_key_values": DynamicCache(config=model.config)}
        with pytest.raises(vera_fx.ExportError, match="DynamicCache"):
            vera_fx.export_program(model, kwargs=call)

    def test_vectors_that_do_not_fit(self) -> None:
        _, model = adapted("mlp")
        program = vera_fx.export_program(model, kwargs=call_of("mlp"), form="input")
        vectors = vera_fx.program_vectors(model)
        run, key = program.module(), next(iter(vectors))
        with pytest.raises(Exception, match="lin0.vera_lambda_d"):
            run(**call_of("mlp"), vectors={**vectors, key: torch.ones(5)})
        for name, config in {
            "targets": {"target_modules": ["lin0"]},
            "seed": {"target_modules": ["lin0", "lin1"], "projection_prng_key": 5},
        }.items():
            vera_fx.add_adapter(model, name, vera_fx.VeraConfig(r=6, **config))
        with pytest.raises(vera_fx.ExportError, match="'targets' has no .*lin1"):
            vera_fx.program_vectors(model, "targets", program)
        with pytest.raises(vera_fx.ExportError, match=r"other projections \(seed 5\)"):
            vera_fx.program_vectors(model, "seed", program)
        merged = vera_fx.export_program(model, kwargs=call_of("mlp"), form="merged")
        with pytest.raises(vera_fx.ExportError, match="takes no vectors"):
            vera_fx.program_vectors(model, "default", merged)


class TestFiles:
    def test_the_manifest_survives(self, tmp_path: Path) -> None:
        _, model = adapted("mlp")
        program = vera_fx.export_program(model, kwargs=call_of("mlp"), form="input")
        loaded = vera_fx.load_program(vera_fx.save_program(program, tmp_path / "new" / "p.pt2"))
        vectors = vera_fx.program_vectors(model, "default", loaded)
        result = loaded.module()(**call_of("mlp"), vectors=vectors)
        assert_close(result, eager(model, "mlp", call_of("mlp")))
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.pt2"]

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        _, model = adapted("mlp")
        program = vera_fx.export_program(model, kwargs=call_of("mlp"))
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(vera_fx.ExportError, match="could not be saved"):
            vera_fx.save_program(program, tmp_path / "file" / "p.pt2")
        with pytest.raises(vera_fx.ExportError, match=r"must end in \.pt2"):
            vera_fx.save_program(program, tmp_path / "p.onnx")

    def test_damaged(self, tmp_path: Path) -> None:
        (tmp_path / "p.pt2").write_text("no program")
        for path in (tmp_path / "p.pt2", tmp_path / "missing.pt2"):
            with pytest.raises(vera_fx.ExportError, match="cannot be read"):
                vera_fx.load_program(path)
