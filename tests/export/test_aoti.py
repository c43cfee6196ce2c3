"""`export_aoti`: packages that run in Python and in C++, and swap adapters without a build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.export.export_models import FORMS, adapted, call_of, eager, extra_of, fixed_of
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a compiler")


def package(model: nn.Module, folder: Path, name: str, form: str) -> Path:
    example = {**call_of(name), **fixed_of(name)}
    return vera_fx.export_aoti(model, folder / f"{form}.pt2", kwargs=example, form=form)


def two_adapters(name: str) -> tuple[nn.Module, nn.Module]:
    base, model = adapted(name)
    vera_fx.add_adapter(model, "other")
    fill_vectors(model)
    return base, model


def expected(base: nn.Module, model: nn.Module, adapter: str, name: str, call: dict) -> Tensor:
    vera_fx.set_adapter(model, adapter)
    return eager(hook_reference(base, model), name, call)


def test_constant_form_swaps_by_load_constants(tmp_path: Path) -> None:
    base, model = two_adapters("mlp")
    run = torch._inductor.aoti_load_package(package(model, tmp_path, "mlp", "constant"))
    for adapter in ("default", "other", "default"):
        vectors = vera_fx.program_vectors(model, adapter, run)
        assert all(name.startswith("vera.lin") for name in vectors)
        run.load_constants(vectors, check_full_update=False)
        for batch in (3, 8):
            call = call_of("mlp", batch)
            result = run(**call)
            assert_close(result, expected(base, model, adapter, "mlp", call), factor=5)
            assert_far_apart(result, eager(base, "mlp", call))
    vera_fx.add_adapter(model, "small", vera_fx.VeraConfig(r=3, target_modules=["lin0", "lin1"]))
    with pytest.raises(vera_fx.ExportError, match=r"has shape \(3,\)"):
        vera_fx.program_vectors(model, "small", run)


CHECKED = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
call = torch.load(sys.argv[2])
try:
    run(**call)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_input_form_swaps_by_the_call(tmp_path: Path) -> None:
    base, model = two_adapters("mlp")
    path = package(model, tmp_path, "mlp", "input")
    run = torch._inductor.aoti_load_package(path)
    call = call_of("mlp", 4)
    for adapter in ("default", "other"):
        vectors = vera_fx.program_vectors(model, adapter, run)
        result = run(**call, vectors=vectors)
        assert_close(result, expected(base, model, adapter, "mlp", call), factor=5)

    wrong = {key: torch.ones(len(value) + 1) for key, value in vectors.items()}
    torch.save({**call, "vectors": wrong}, tmp_path / "call.pt")
    done = subprocess.run(
        [sys.executable, "-c", CHECKED, path, tmp_path / "call.pt"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"},
    )
    assert "expected: 6, but got: 7" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_families(name: str, tmp_path: Path) -> None:
    base, model = adapted(name)
    for form in FORMS:
        run = torch._inductor.aoti_load_package(package(model, tmp_path, name, form))
        for batch, length in ((3, 7), (2, 9)):
            call = call_of(name, batch, length)
            result = run(**call, **extra_of(model, form, call))["logits"]
            assert_close(result, eager(hook_reference(base, model), name, call), factor=10)
            assert_far_apart(result, eager(base, name, call))


def built_runner(folder: Path) -> Path:
    root = Path(torch.__file__).parent
    source, runner = Path(__file__).parent / "aoti_runner.cpp", folder / "runner"
    includes = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    libraries = [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", "-O0", abi, *includes, source, "-o", runner, *libraries]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return runner


@pytest.mark.slow
def test_cpp_program_runs_every_form_and_swaps_adapters(tmp_path: Path) -> None:
    base, model = two_adapters("mlp")
    runner, x = built_runner(tmp_path), call_of("mlp", 6)["x"]
    wanted = {n: expected(base, model, n, "mlp", {"x": x}) for n in ("default", "other")}
    vera_fx.set_adapter(model, "default")
    assert_far_apart(wanted["default"], wanted["other"])
    for form in FORMS:
        path = package(model, tmp_path, "mlp", form)
        run = torch._inductor.aoti_load_package(path)
        calls: list = [[x]]
        if form == "constant":
            calls += [vera_fx.program_vectors(model, "other", run), [x]]
        elif form == "input":
            names = ("default", "other")
            calls = [[x, *vera_fx.program_vectors(model, n, run).values()] for n in names]
        elif form == "rows":
            stacks = vera_fx.program_vectors(model, ["default", "other"], run).values()
            calls = [[x, *stacks, torch.full((6,), number)] for number in range(2)]
        torch.save(calls, tmp_path / "calls.pt")
        subprocess.run([runner, path, tmp_path / "calls.pt", tmp_path / "out.pt"], check=True)
        results = torch.load(tmp_path / "out.pt", weights_only=False)
        assert len(results) == (1 if form == "merged" else 2)
        for result, name in zip(results, wanted, strict=False):
            assert_close(result, wanted[name], factor=5, what=f"{form} {name}")


def test_nothing_is_touched_when_the_build_fails(tmp_path: Path, monkeypatch) -> None:
    _, model = adapted("mlp")
    (tmp_path / "merged.pt2").write_text("old")

    def fail(*_args, **_kwargs) -> None:
        raise RuntimeError("C++ compile error")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    with pytest.raises(vera_fx.ExportError, match="C\\+\\+ compile error"):
        package(model, tmp_path, "mlp", "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["merged.pt2"]
    assert (tmp_path / "merged.pt2").read_text() == "old"
    with pytest.raises(vera_fx.ExportError, match=r"must end in \.pt2"):
        vera_fx.export_aoti(model, tmp_path / "a.so", kwargs=call_of("mlp"))
