"""The plain base runs from a kept capture: no adapter's graph is made of it, and it is to run all the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import vera_fx
from tests.helpers import fill_vectors
from tests.models import MLP

X = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = vera_fx.VeraConfig(r=3, target_modules=["lin0", "lin1"])
    model = vera_fx.adapt(MLP().eval(), config)
    fill_vectors(model)
    return model


def outputs(model: nn.Module, off: str, *, compiled: bool) -> tuple[torch.Tensor, ...]:
    """With the adapter, without it, and with it merged; first the way that ``off`` says."""
    call = torch.compile(model, backend="eager") if compiled else model
    found: dict[str, torch.Tensor] = {}
    for way in (off, "on", "disabled", "none active", "merged"):
        if way == "disabled":
            with vera_fx.disable_adapters(model), torch.inference_mode():
                found["plain"] = call(X).clone()
        elif way == "none active":
            vera_fx.set_adapter(model, [])
            found["plain"] = call(X).detach()
            vera_fx.set_adapter(model, "default")
        elif way == "merged":
            vera_fx.merge(model)
            found["merged"] = call(X).detach()
            vera_fx.unmerge(model)
        else:
            found["on"] = call(X).detach()
    return found["on"], found["plain"], found["merged"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("off", ["disabled", "none active", "merged"])
def test_the_first_call_runs_the_base(
    tmp_path: Path, exports: Callable[[], int], off: str, compiled: bool
) -> None:
    with vera_fx.capture_cache(tmp_path):
        on, plain, _ = outputs(adapted(), off, compiled=compiled)
        assert exports() > 0
        torch.compiler.reset()
        again_on, again_plain, merged = outputs(adapted(), off, compiled=compiled)
        assert exports() == 0
    torch.testing.assert_close(again_on, on, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again_plain, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged, on, rtol=1e-5, atol=1e-6)
    assert (on - plain).abs().min() > 1e-5
