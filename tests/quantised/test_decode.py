"""One token at a time over a quantised half-precision base: right, and compiled once."""

from typing import Any

import pytest
import torch

import vera_fx
from tests.helpers import fill_vectors
from tests.models import llama

pytest.importorskip("bitsandbytes")

from benchmarks.cases import quantise

IDS = torch.arange(9)[None] * 7 % 64


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    base = quantise(llama().to(torch.bfloat16).eval(), "nf4").to("cpu")
    sites = vera_fx.VeraConfig(r=8, target_modules=["q_proj", "v_proj"], d_initial=0.5)
    adapted: Any = vera_fx.adapt(base, sites)
    fill_vectors(adapted)
    return adapted


def decoded(call: Any, length: int, steps: int = 1) -> torch.Tensor:
    found = call(input_ids=IDS[:, :length], use_cache=True)
    for step in range(steps):
        token = IDS[:, length + step : length + step + 1]
        found = call(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
    return found.logits[:, -1]


def test_the_last_token_is_the_whole_calls(model: Any) -> None:
    with torch.no_grad():
        whole, last = model(input_ids=IDS).logits[:, 8], decoded(model, 8)
        with vera_fx.disable_adapters(model):
            without = decoded(model, 8)
    torch.testing.assert_close(last, whole, rtol=0.02, atol=0.02 * whole.abs().max().item())
    assert (last - without).abs().max() > 0.1 * whole.abs().max()


def test_compiled_once_for_every_length(model: Any, fresh_dynamo: Any) -> None:
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (4, 5, 6):
            decoded(call, length, 3)
        with torch.compiler.set_stance("fail_on_recompile"):
            for length in (3, 6, 2):
                assert decoded(call, length, 3).isfinite().all()
