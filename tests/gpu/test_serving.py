"""Switches, mixtures, generation, CUDA graphs and exports on the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.gpu.test_training import adapted, inputs
from tests.helpers import fill_adapters


def two(device: torch.device, **options: Any) -> nn.Module:
    model = adapted(device, **options).eval()
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=4, target_modules="all-linear"))
    fill_adapters(model)
    return model


def test_switches_and_mixtures(device: torch.device) -> None:
    model, batch = two(device), inputs(device)
    rows = {}
    with torch.no_grad():
        for name in ("default", "other"):
            vera_fx.set_adapter(model, name)
            rows[name] = model(**batch).logits
        mixture = model(**batch, adapter_names=["default", "other", "default"]).logits
    torch.testing.assert_close(mixture[0], rows["default"][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixture[1], rows["other"][1], rtol=1e-3, atol=1e-3)


def test_a_saved_adapter_comes_back(device: torch.device, tmp_path: Path) -> None:
    model, batch = two(device), inputs(device)
    with torch.no_grad():
        expected = model(**batch).logits
        vera_fx.save_adapter(model, tmp_path)
        again = vera_fx.load_adapter(vera_fx.unload(model), tmp_path)
        assert torch.equal(again.eval()(**batch).logits, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(device: torch.device, cache: str) -> None:
    model = two(device)
    ids = inputs(device)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **options), expected)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs(device: torch.device, mode: str, fresh_dynamo: Any) -> None:
    """Training and calls without gradients in a mode that records CUDA graphs."""
    model, batch = two(device), inputs(device)
    compiled = torch.compile(model, mode=mode)
    expected = model(**batch).loss.detach()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(**batch).loss
        loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            served = compiled(**batch).loss.clone()
    torch.testing.assert_close(served, expected, rtol=1e-3, atol=1e-3)
    assert not fresh_dynamo["inductor"].get("cudagraph_skips", 0)


def test_export(device: torch.device) -> None:
    model, batch = two(device), inputs(device)
    del batch["labels"]
    with torch.no_grad():
        expected = model(**batch).logits
        program = vera_fx.export_program(model, kwargs=batch, form="constant")
        found = program.module()(**batch)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-3, atol=1e-3)
