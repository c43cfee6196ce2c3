"""`export_executorch`: programs for ExecuTorch's runtime, with adapters in data files beside them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import vera_fx
from tests.export.export_models import FORMS, adapted, call_of, eager, extra_of, fixed_of
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference

pytest.importorskip("executorch.runtime", reason="ExecuTorch is not installed")


def export(model: Any, name: str, path: Path, form: str, sizes=(4, 7), **options: Any) -> Path:
    example = {**call_of(name, *sizes), **fixed_of(name)}
    return vera_fx.export_executorch(model, path, kwargs=example, form=form, **options)


def method(path: Path, data: Path | None = None) -> Any:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path, data_path=data).load_method("forward")


def run(loaded: Any, *arguments: Any) -> Tensor:
    return loaded.execute([leaf.contiguous() for leaf in tree_leaves(arguments)])[0]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "llama", "bert", "vit")]


@pytest.mark.parametrize("name", ["mlp", *SLOW])
def test_every_form_equals_the_eager_definition(name: str, tmp_path: Path) -> None:
    base, model = adapted(name)
    oracle = hook_reference(base, model) if name != "bert" else model  # bert's head is trained
    for form in FORMS:
        path = export(model, name, tmp_path / f"{form}.pte", form)
        data = tmp_path / "constant.ptd" if form == "constant" else None
        loaded = method(path, data)
        for batch, length in ((4, 7), (2, 5), (1, 3)):
            call = call_of(name, batch, length)
            result = run(loaded, call, extra_of(model, form, call))
            assert_close(result, eager(oracle, name, call), factor=10, what=form)
            assert_far_apart(result, eager(base, name, call))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "constant.ptd",
        *(f"{form}.pte" for form in sorted(FORMS)),
    ]


ELSEWHERE = """
import sys, torch
from executorch.runtime import Runtime
program, call, *files = sys.argv[1:]
results = []
for data in files[:-1]:
    method = Runtime.get().load_program(program, data_path=data).load_method("forward")
    results.append(method.execute([torch.load(call)])[0].clone())
unwanted = {"vera_fx", "transformers", "peft"} & set(sys.modules)
assert not unwanted, unwanted
torch.save(results, files[-1])
"""


def test_another_adapter_is_another_data_file(tmp_path: Path) -> None:
    base, model = adapted("mlp")
    vera_fx.add_adapter(model, "other")
    fill_vectors(model)
    path = export(model, "mlp", tmp_path / "m.pte", "constant")
    other = tmp_path / "new" / "other.ptd"
    vera_fx.export_executorch_data(model, other, path, adapter_name="other")
    same = vera_fx.export_executorch_data(
        model, tmp_path / "same.ptd", path, adapter_name="default"
    )
    x = call_of("mlp", 2)["x"]
    torch.save(x, tmp_path / "x.pt")
    files = [tmp_path / "m.ptd", other, same]
    arguments = [path, tmp_path / "x.pt", *files, tmp_path / "out.pt"]
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, *arguments], check=True)

    results = torch.load(tmp_path / "out.pt")
    for name, result in zip(("default", "other", "default"), results, strict=True):
        vera_fx.set_adapter(model, name)
        assert_close(result, eager(hook_reference(base, model), "mlp", {"x": x}), factor=5)
    assert_far_apart(results[0], results[1])
    vectors = vera_fx.program_vectors(model, "default")["base_model.model.lin0.vera_lambda_b"]
    assert vectors.numpy().tobytes() in files[0].read_bytes()
    assert vectors.numpy().tobytes() not in path.read_bytes()
    with pytest.raises(RuntimeError):
        method(path)


def test_sizes_up_to_the_examples_or_to_a_bound(tmp_path: Path) -> None:
    _, model = adapted("mlp")
    call = call_of("mlp", 5)
    with pytest.raises(RuntimeError):
        run(method(export(model, "mlp", tmp_path / "m.pte", "merged")), call)
    shapes = {"x": {0: Dim("batch", min=1, max=8)}}
    path = export(model, "mlp", tmp_path / "m.pte", "merged", dynamic_shapes=shapes)
    assert_close(run(method(path), call), eager(model, "mlp", call), factor=5)


@pytest.mark.slow
def test_a_size_that_lowering_fixes_is_refused(tmp_path: Path) -> None:
    _, model = adapted("gpt2")
    with pytest.raises(vera_fx.ExportError, match="fixes dimension 0 of input .* to 3"):
        export(model, "gpt2", tmp_path / "m.pte", "merged", sizes=(3, 7))
    assert not list(tmp_path.iterdir())


def test_rows_have_adapters_of_their_own(tmp_path: Path) -> None:
    _, model = adapted("mlp")
    names = ["default", "b", "c", "__base__"]
    for name in names[1:3]:
        vera_fx.add_adapter(model, name)
    fill_vectors(model)
    shapes = {"x": {0: Dim("batch", min=1, max=8)}, "vectors": Dim("adapters", min=1, max=9)}
    path = export(model, "mlp", tmp_path / "m.pte", "rows", dynamic_shapes=shapes)
    call, index = call_of("mlp", 6), torch.tensor([3, 1, 0, 2, 2, 3])
    loaded = method(path)
    result = run(loaded, call, vera_fx.program_vectors(model, names), index)
    with torch.no_grad():
        assert_close(result, model(**call, adapter_names=[names[i] for i in index]), factor=5)
    with pytest.raises(RuntimeError):
        run(loaded, call, vera_fx.program_vectors(model, names), index + 1)


def test_a_backend(tmp_path: Path) -> None:
    xnnpack = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    _, model = adapted("mlp")
    parts = [xnnpack.XnnpackPartitioner()]
    call = call_of("mlp")
    for form in FORMS:
        path = export(model, "mlp", tmp_path / f"{form}.pte", form, partitioners=parts)
        assert b"XnnpackBackend" in path.read_bytes()
        loaded = method(path, tmp_path / "constant.ptd" if form == "constant" else None)
        result = run(loaded, call, extra_of(model, form, call))
        assert_close(result, eager(model, "mlp", call), factor=10)
    # A trained bias belongs to the adapter, and XNNPACK takes it into its part of the program.
    _, biased = adapted("mlp", bias="all")
    with pytest.raises(vera_fx.ExportError, match=r"a partitioner took vera\.lin.*bias into"):
        export(biased, "mlp", tmp_path / "biased.pte", "constant", partitioners=parts)
    assert not (tmp_path / "biased.pte").exists()


class TestBadInput:
    def test_adapters_and_programs_that_do_not_fit(self, tmp_path: Path) -> None:
        _, model = adapted("mlp")
        path = export(model, "mlp", tmp_path / "m.pte", "constant")
        merged = export(model, "mlp", tmp_path / "merged.pte", "merged")
        config = {"target_modules": ["lin0", "lin1"]}
        vera_fx.add_adapter(model, "rank", vera_fx.VeraConfig(r=3, **config))
        vera_fx.add_adapter(model, "seed", vera_fx.VeraConfig(r=6, projection_prng_key=4, **config))
        data = tmp_path / "o.ptd"
        for adapter, program, reason in (
            ("rank", path, r"shape \(3,\)"),
            ("seed", path, r"other projections \(seed 4\)"),
            ("default", merged, "its form is 'merged'"),
            ("default", tmp_path / "none.pte", "there is no program"),
        ):
            with pytest.raises(vera_fx.ExportError, match=reason):
                vera_fx.export_executorch_data(model, data, program, adapter_name=adapter)
        with pytest.raises(vera_fx.ExportError, match=r"must end in \.ptd"):
            vera_fx.export_executorch_data(model, tmp_path / "o.pt", path)
        with pytest.raises(vera_fx.ExportError, match=r"must end in \.pte"):
            vera_fx.export_executorch(model, tmp_path / "o.pt", kwargs=call_of("mlp"))
        assert not data.exists()

    def test_nothing_is_touched(self, tmp_path: Path, monkeypatch) -> None:
        _, model = adapted("mlp")
        for name in ("m.pte", "m.ptd"):
            (tmp_path / name).write_text("old")

        def fail(*_args: Any, **_kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        place = "executorch.exir.ExecutorchProgramManager.write_tensor_data_to_file"
        monkeypatch.setattr(place, fail)
        with pytest.raises(vera_fx.ExportError, match="No space left"):
            export(model, "mlp", tmp_path / "m.pte", "constant")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.ptd", "m.pte"]
        assert {p.read_text() for p in tmp_path.iterdir()} == {"old"}
