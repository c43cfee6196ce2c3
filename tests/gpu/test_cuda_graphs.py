"""CUDA graphs under switches of adapters; ``tests/graphs/test_cuda_graphs.py`` on a device that records them."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.gpu.test_training import adapted, inputs
from tests.helpers import fill_adapters

RECORDINGS = "cudagraph_recorded_non_static_inputs"
"""Torch's counter: by how many inputs are copied in, so it stands still where nothing is recorded."""


@pytest.fixture
def counters(device: torch.device, fresh_dynamo: Any) -> Iterator[Any]:
    if device.type != "cuda":
        pytest.skip("only CUDA records graphs")
    yield fresh_dynamo["inductor"]
    assert not fresh_dynamo["inductor"]["cudagraph_skips"]


def three(device: torch.device) -> nn.Module:
    model = adapted(device).eval()
    for name, seed in (("same", 0), ("other seed", 5)):
        config = vera_fx.VeraConfig(r=6, target_modules="all-linear", projection_prng_key=seed)
        vera_fx.add_adapter(model, name, config)
    fill_adapters(model)
    return model


NAMES = ("default", "same", "other seed")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_switch_records_nothing(
    mode: str, grad: bool, device: torch.device, counters: Any
) -> None:
    model, batch = three(device), inputs(device)
    compiled = torch.compile(model, mode=mode, fullgraph=True)

    def call(name: str) -> None:
        vera_fx.set_adapter(model, name)
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(**batch).loss
        if grad:
            model.zero_grad()
            loss.backward()
        torch.testing.assert_close(
            loss.detach(), model(**batch).loss.detach(), rtol=1e-3, atol=1e-3
        )

    with torch.set_grad_enabled(grad):
        for _ in range(3):  # a run to warm up, one to record, one to replay
            call("default")
        recorded = counters[RECORDINGS]
        assert recorded
        with torch.compiler.set_stance("fail_on_recompile"):
            for name in (*NAMES, *NAMES):
                call(name)
    assert counters[RECORDINGS] == recorded


def test_generate_with_a_static_cache_is_recorded(
    device: torch.device, counters: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers compiles the decoding itself, for CUDA graphs."""
    model, ids = three(device), inputs(device)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with caplog.at_level(logging.WARNING):
        for name in NAMES:
            vera_fx.set_adapter(model, name)
            expected = model.generate(ids, **options)
            found = model.generate(ids, cache_implementation="static", **options)
            assert torch.equal(found, expected), name
    assert "skipping cudagraph" not in caplog.text
