"""Random models and sizes: every exported form equals the eager definition."""

import copy
import tempfile
from pathlib import Path

import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import vera_fx
from tests.export.export_models import FORMS, extra_of
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference
from tests.strategies import Case, cases


def adapted(case: Case) -> tuple[nn.Module, nn.Module]:
    """The adapted model, and its eager definition."""
    model = vera_fx.adapt(copy.deepcopy(case.model), case.config).eval()
    fill_vectors(model)
    return model, hook_reference(case.model.eval(), model)


def sizes_of(x: Tensor) -> list[Tensor]:
    """The example, and another input in which every size that is open differs."""
    lead = [size + 1 + n if size > 1 else 1 for n, size in enumerate(x.shape[:-1])]
    return [x, torch.randn(*lead, x.shape[-1], dtype=x.dtype)]


def forms_of(case: Case) -> tuple[str, ...]:
    return FORMS if case.x.ndim > 1 else FORMS[:3]  # a lone vector has no rows


@settings(max_examples=10)
@given(cases(min_size=1))
def test_programs(case: Case) -> None:
    model, oracle = adapted(case)
    for form in forms_of(case):
        run = vera_fx.export_program(model, (case.x,), form=form).module()
        for x in sizes_of(case.x):
            result = run(x, **extra_of(model, form, {"x": x}))
            assert_close(result, oracle(x).detach(), what=f"{form} {tuple(x.shape)}")
            assert_far_apart(result, case.model(x))


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(cases(dtype=torch.float32, min_size=1))
def test_onnx_files(case: Case) -> None:
    model, oracle = adapted(case)
    for form in forms_of(case):
        with tempfile.TemporaryDirectory() as folder:
            path = vera_fx.export_onnx(model, Path(folder) / "m.onnx", (case.x,), form=form)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for x in sizes_of(case.x):
            extra = extra_of(model, form, {"x": x})
            feed = {"x": x, **extra.pop("vectors", {}), **extra}
            (result,) = session.run(None, {name: value.numpy() for name, value in feed.items()})
            assert_close(torch.from_numpy(result), oracle(x).detach(), factor=10, what=form)


@pytest.mark.slow
@settings(max_examples=3, suppress_health_check=list(HealthCheck))
@given(cases(dtype=torch.float32, min_size=1))
def test_packages(case: Case) -> None:
    model, oracle = adapted(case)
    for form in forms_of(case):
        with tempfile.TemporaryDirectory() as folder:
            path = vera_fx.export_aoti(model, Path(folder) / "m.pt2", (case.x,), form=form)
            run = torch._inductor.aoti_load_package(path)
        for x in sizes_of(case.x):
            result = run(x, **extra_of(model, form, {"x": x}))
            assert_close(result, oracle(x).detach(), factor=10, what=form)
