"""`form="rows"`: one program for batches that mix adapters, the plain base among them."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vera_fx
from tests.export.export_models import call_of, eager, fixed_of
from tests.export.test_onnx import run, session_of
from tests.helpers import assert_close, assert_far_apart, fill_vectors, main_output
from tests.mixing.test_mixed import Flips
from tests.models import BY_NAME

BASE = "__base__"
NAMES = ("default", "other", "third")


def adapted(name: str, **config: Any) -> tuple[nn.Module, nn.Module]:
    """A base, and a copy of it with three adapters that differ in all they own."""
    family = BY_NAME[name]
    base = family.build().eval()
    settings = vera_fx.VeraConfig(**{"r": 6, **family.config, **config})
    model = vera_fx.adapt(copy.deepcopy(base), settings).eval()
    for other in NAMES[1:]:
        vera_fx.add_adapter(model, other)
    fill_vectors(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in map(model.vera.adapter, NAMES):
            for _, _, tensor in adapter.copied_tensors():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return base, model


def program_of(model: nn.Module, name: str, **options: Any):
    example = {**call_of(name), **fixed_of(name)}
    return vera_fx.export_program(model, kwargs=example, form="rows", **options)


def expected(
    base: nn.Module, model: nn.Module, name: str, call: dict, names: list[str]
) -> list[Tensor]:
    """For each row what its adapter gives for the whole batch, by the adapted model itself."""
    found = {BASE: eager(base, name, call)}
    for adapter in dict.fromkeys(names):
        if adapter != BASE:
            vera_fx.set_adapter(model, adapter)
            found[adapter] = eager(model, name, call)
    return [found[adapter][row] for row, adapter in enumerate(names)]


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "llama", "t5", "vit", "opt")]


@pytest.mark.parametrize("name", ["mlp", "bert", *SLOW])
def test_every_row_is_its_adapters(name: str) -> None:
    base, model = adapted(name, **({"bias": "all"} if name == "bert" else {}))
    run_program = program_of(model, name).module()
    stacks = [["other"], [BASE, "default"], ["third", "default", BASE, "other"]]
    for stacked, (batch, length) in zip(stacks, ((3, 7), (2, 9), (5, 4)), strict=True):
        vectors = vera_fx.program_vectors(model, stacked)
        index = torch.arange(batch).flip(0) % len(stacked)
        call = call_of(name, batch, length)
        result = main_output_of(run_program(**call, vectors=vectors, adapter_index=index))
        rows = expected(base, model, name, call, [stacked[i] for i in index])
        for row, value in enumerate(rows):
            assert_close(result[row], value, factor=5, what=f"{stacked} row {row}")
        assert_far_apart(result, eager(base, name, call))


def main_output_of(result: Any) -> Tensor:
    return result["logits"] if isinstance(result, dict) else main_output(result)


def test_saved_adapters_are_stacked_without_the_model(tmp_path: Path) -> None:
    base, model = adapted("bert", save_projection=False)
    path = vera_fx.save_program(program_of(model, "bert"), tmp_path / "p.pt2", projections=False)
    files = []
    for name in NAMES:
        folder = vera_fx.save_adapter(model, tmp_path / name, adapter_name=name)
        files.append(load_file(folder / "adapter_model.safetensors"))
    vectors = {key: torch.stack([file[key] for file in files]) for key in files[0]}
    call = call_of("bert", 4)
    index = torch.tensor([2, 0, 1, 0])
    result = vera_fx.load_program(path).module()(**call, vectors=vectors, adapter_index=index)

    rows = expected(base, model, "bert", call, [NAMES[i] for i in index])
    assert_close(result["logits"], torch.stack(rows), factor=5)


def test_onnx_file_mixes_adapters(tmp_path: Path) -> None:
    base, model = adapted("bert")
    path = tmp_path / "m.onnx"
    vera_fx.export_onnx(model, path, kwargs=call_of("bert"), form="rows")
    session = session_of(path)
    stacked = ["third", BASE, "other"]
    vectors = vera_fx.program_vectors(model, stacked)
    inputs = ["input_ids", "attention_mask", *vectors, "adapter_index"]
    assert [i.name for i in session.get_inputs()] == inputs
    for batch, length in ((3, 7), (5, 4)):
        call, index = call_of("bert", batch, length), torch.arange(batch) % 3
        result = run(session, {**call, "adapter_index": index}, vectors)
        rows = expected(base, model, "bert", call, [stacked[i] for i in index])
        assert_close(result, torch.stack(rows), factor=10)
    with pytest.raises(Exception, match="indices element out of data bounds, idx=3"):
        run(session, {**call, "adapter_index": np.full(batch, 3)}, vectors)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a compiler")
def test_package_mixes_adapters(tmp_path: Path) -> None:
    base, model = adapted("bert")
    path = tmp_path / "p.pt2"
    vera_fx.export_aoti(model, path, kwargs=call_of("bert"), form="rows")
    package, stacked = torch._inductor.aoti_load_package(path), ["third", BASE, "other"]
    vectors = vera_fx.program_vectors(model, stacked, package)
    for batch, length in ((3, 7), (5, 4)):
        call, index = call_of("bert", batch, length), torch.arange(batch) % 3
        result = package(**call, vectors=vectors, adapter_index=index)["logits"]
        rows = expected(base, model, "bert", call, [stacked[i] for i in index])
        assert_close(result, torch.stack(rows), factor=10)
    for outside in (3, -1):
        with pytest.raises(RuntimeError):
            package(**call, vectors=vectors, adapter_index=torch.full((5,), outside))


@pytest.mark.parametrize("form", [None, {"x": {0: torch.export.Dim("batch", min=2, max=8)}}])
def test_dynamic_shapes(form: Any) -> None:
    base, model = adapted("mlp")
    run_program = program_of(model, "mlp", dynamic_shapes=form).module()
    for batch in (3,) if form is None else (2, 8):
        call, index = call_of("mlp", batch), torch.arange(batch) % 3
        vectors = vera_fx.program_vectors(model, NAMES)
        result = run_program(**call, vectors=vectors, adapter_index=index)
        rows = expected(base, model, "mlp", call, [NAMES[i] for i in index])
        assert_close(result, torch.stack(rows))


def test_one_row() -> None:
    base, model = adapted("mlp")
    call = call_of("mlp", 1)
    run_program = vera_fx.export_program(model, kwargs=call, form="rows").module()
    vectors = vera_fx.program_vectors(model, NAMES)
    for number, name in enumerate(NAMES):
        result = run_program(**call, vectors=vectors, adapter_index=torch.tensor([number]))
        assert_close(result[0], expected(base, model, "mlp", call, [name])[0])


class TestBadInput:
    def test_at_run_time(self) -> None:
        _, model = adapted("mlp")
        program = program_of(model, "mlp")
        call, vectors = call_of("mlp", 4), vera_fx.program_vectors(model, NAMES, program)
        for outside in (3, -1):
            index = torch.tensor([0, 1, outside, 2])
            with pytest.raises(RuntimeError, match="adapter_index has an entry that is not"):
                program.module()(**call, vectors=vectors, adapter_index=index)
        index, first = torch.zeros(4, dtype=torch.int64), next(iter(vectors))
        for wrong, reason in (
            ({"adapter_index": index[:3]}, r"adapter_index.size\(\)\[0\] == x.size"),
            ({"vectors": {k: v[:, 1:] for k, v in vectors.items()}}, r"lin0.*size\(\)\[1\] == 6"),
            ({"vectors": {**vectors, first: vectors[first][1:]}}, r"lambda_d'\].size\(\)\[0\]"),
        ):
            with pytest.raises(AssertionError, match=reason):
                program.module()(**{**call, "vectors": vectors, "adapter_index": index, **wrong})

    def test_adapters_that_cannot_be_stacked(self) -> None:
        _, model = adapted("mlp")
        config = vera_fx.VeraConfig(r=3, target_modules=["lin0", "lin1"])
        vera_fx.add_adapter(model, "small", config)
        program = program_of(model, "mlp")
        with pytest.raises(
            vera_fx.ExportError, match=r"'small' .* shape \(3,\), the program takes"
        ):
            vera_fx.program_vectors(model, ["default", "small"], program)
        with pytest.raises(vera_fx.ExportError, match="'default' and 'small' cannot be stacked"):
            vera_fx.program_vectors(model, ["default", "small"])
        with pytest.raises(vera_fx.AdapterError, match="did you mean 'other'"):
            vera_fx.program_vectors(model, ["othr"], program)
        with pytest.raises(vera_fx.ExportError, match="no adapter was given"):
            vera_fx.program_vectors(model, [BASE], program)
        single = vera_fx.export_program(model, kwargs=call_of("mlp"), form="input")
        with pytest.raises(vera_fx.ExportError, match='only form="rows" takes several'):
            vera_fx.program_vectors(model, ["default"], single)
        one = vera_fx.program_vectors(model, "third", program)
        assert {len(value) for value in one.values()} == {1}

    def test_rows_that_cannot_be_told_apart(self) -> None:
        config = vera_fx.VeraConfig(r=2, target_modules=["second"])
        model = vera_fx.adapt(Flips(), config).eval()
        with pytest.raises(vera_fx.ExportError, match="across the rows"):
            vera_fx.export_program(model, (torch.randn(3, 4),), form="rows")

    def test_a_model_with_an_argument_of_that_name(self) -> None:
        class Taken(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(4, 3)

            def forward(self, adapter_index: Tensor) -> Tensor:
                return self.lin(adapter_index)

        model = vera_fx.adapt(Taken(), vera_fx.VeraConfig(r=2, target_modules=["lin"])).eval()
        with pytest.raises(vera_fx.ExportError, match="other than 'vectors' and 'adapter_index'"):
            vera_fx.export_program(model, (torch.ones(2, 4),))
