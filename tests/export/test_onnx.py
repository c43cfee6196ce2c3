"""`export_onnx`: files that onnxruntime runs, equal to the eager definition."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

import vera_fx
from tests.export.export_models import FORMS, adapted, call_of, eager, extra_of, fixed_of
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference
from tests.models import MLP


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, call: dict, vectors: dict | None = None) -> Tensor:
    feed = {name: np.asarray(value) for name, value in {**call, **(vectors or {})}.items()}
    return torch.from_numpy(session.run(None, feed)[0])


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("gpt2", "llama", "bert", "t5", "vit", "opt")
]


@pytest.mark.parametrize("name", ["mlp", *SLOW])
def test_every_form_equals_the_eager_definition(name: str, tmp_path: Path) -> None:
    base, model = adapted(name)
    oracle = hook_reference(base, model) if name != "bert" else model  # bert's head is trained
    for form in FORMS:
        example = {**call_of(name), **fixed_of(name)}
        path = vera_fx.export_onnx(model, tmp_path / f"{form}.onnx", kwargs=example, form=form)
        session = session_of(path)
        for batch, length in ((3, 7), (2, 9), (5, 4)):
            # The first row of every call starts with padding, whose queries look at no key.
            call = call_of(name, batch, length)
            extra = extra_of(model, form, call)
            vectors = extra.pop("vectors", None)
            result = run(session, {**call, **extra}, vectors)
            assert_close(result, eager(oracle, name, call), factor=10, what=form)
            assert_far_apart(result, eager(base, name, call))


def test_a_saved_adapter_is_the_feed_as_it_is(tmp_path: Path) -> None:
    base, model = adapted("mlp", save_projection=False)
    path = vera_fx.export_onnx(model, tmp_path / "m.onnx", kwargs=call_of("mlp"), form="input")
    session = session_of(path)
    assert [i.name for i in session.get_inputs()] == ["x", *vera_fx.program_vectors(model)]
    assert [o.name for o in session.get_outputs()] == ["output"]
    vera_fx.add_adapter(model, "other")
    fill_vectors(model)
    results = []
    for name in ("default", "other"):
        vera_fx.set_adapter(model, name)
        folder = vera_fx.save_adapter(model, tmp_path / name, adapter_name=name)
        results.append(
            run(session, call_of("mlp", 4), load_file(folder / "adapter_model.safetensors"))
        )
        expected = eager(hook_reference(base, model), "mlp", call_of("mlp", 4))
        assert_close(results[-1], expected, factor=5)


def test_names_shapes_and_what_is_inside(tmp_path: Path) -> None:
    _, model = adapted("bert")
    path = vera_fx.export_onnx(model, tmp_path / "m.onnx", kwargs=call_of("bert"), form="constant")
    session, file = session_of(path), onnx.load(path)

    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    assert {node.domain for node in file.graph.node} <= {"", "ai.onnx"}
    names = {tensor.name for tensor in file.graph.initializer}
    assert any(name.endswith("query.vera_lambda_d") for name in names)
    assert '"form": "constant"' in next(p.value for p in file.metadata_props if p.key == "vera_fx")


def test_weights_outside_of_the_file(tmp_path: Path) -> None:
    _, model = adapted("mlp")
    path = vera_fx.export_onnx(
        model, tmp_path / "m.onnx", kwargs=call_of("mlp"), external_data=True
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    result = run(session_of(path), call_of("mlp", 4))
    assert_close(result, eager(model, "mlp", call_of("mlp", 4)), factor=5)


def typed_mlp(dtype: torch.dtype) -> nn.Module:
    config = vera_fx.VeraConfig(r=6, target_modules=["lin0", "lin1"])
    model = vera_fx.adapt(MLP().to(dtype).eval(), config).eval()
    fill_vectors(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_other_precisions(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = typed_mlp(dtype), torch.randn(4, 10, dtype=dtype)
    path = vera_fx.export_onnx(model, tmp_path / "m.onnx", (x,), form=form)
    extra = extra_of(model, form, {"x": x})
    vectors = extra.pop("vectors", None)
    assert_close(run(session_of(path), {"x": x, **extra}, vectors), model(x).detach())


def test_bfloat16_is_valid_onnx(tmp_path: Path) -> None:
    """onnxruntime has no bfloat16 kernels on the CPU; onnx's own evaluator has."""
    import ml_dtypes
    from onnx.reference import ReferenceEvaluator

    model, x = typed_mlp(torch.bfloat16), torch.randn(4, 10, dtype=torch.bfloat16)
    path = vera_fx.export_onnx(model, tmp_path / "m.onnx", (x,), form="constant")
    feed = {"x": x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)}
    (result,) = ReferenceEvaluator(onnx.load(path)).run(None, feed)
    assert result.dtype == ml_dtypes.bfloat16
    found = torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    assert_close(found, model(x).detach())
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        session_of(path)


class NoOnnx(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.qr(self.lin(x))[0]


class TestBadInput:
    def test_vectors_of_another_shape(self, tmp_path: Path) -> None:
        _, model = adapted("mlp")
        path = vera_fx.export_onnx(model, tmp_path / "m.onnx", kwargs=call_of("mlp"), form="input")
        vectors = vera_fx.program_vectors(model)
        name = next(iter(vectors))
        with pytest.raises(Exception, match=f"dimensions for input: {name}"):
            run(session_of(path), call_of("mlp"), {**vectors, name: torch.ones(5)})

    def test_nothing_is_touched(self, tmp_path: Path, monkeypatch) -> None:
        _, model = adapted("mlp")
        path = tmp_path / "m.onnx"
        path.write_text("old")
        with pytest.raises(vera_fx.ExportError, match=r"must end in \.onnx"):
            vera_fx.export_onnx(model, tmp_path / "m.pt2", kwargs=call_of("mlp"))

        def fail(*_args, **_kwargs) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("onnx.checker.check_model", fail)
        with pytest.raises(vera_fx.ExportError, match="No space left"):
            vera_fx.export_onnx(model, path, kwargs=call_of("mlp"))
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
        assert path.read_text() == "old"

    def test_an_operator_without_onnx_form(self, tmp_path: Path) -> None:
        config = vera_fx.VeraConfig(r=2, target_modules=["lin"])
        model = vera_fx.adapt(NoOnnx(), config).eval()
        with pytest.raises(vera_fx.ExportError, match="cannot convert"):
            vera_fx.export_onnx(model, tmp_path / "m.onnx", (torch.ones(5, 4),))
        assert not list(tmp_path.iterdir())
