"""Caches that are made under ``torch.inference_mode()`` run graphs, and hold what PEFT's model puts there."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import vera_fx
from tests.helpers import assert_close, peft_pair
from tests.models import mistral
from vera_fx.model import model_class

ROOM = 12


def windowed(window: int | None) -> nn.Module:
    return mistral(2, window).eval()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many calls of a model ran a graph, and how many Python."""
    counts = {"graph": 0, "python": 0}

    def counted(name: str, kind: str) -> None:
        original = getattr(model_class, name)

        def call(*args: Any) -> Any:
            counts[kind] += 1
            return original(*args)

        monkeypatch.setattr(model_class, name, call)

    counted("run", "graph")
    counted("run_in_python", "python")
    return counts


def said(model: Any, cache: Any) -> list[torch.Tensor]:
    """Logits of a prompt and of single tokens after it, and what the cache holds at the end."""
    ids = torch.arange(8).reshape(2, 4) * 7 % 90 + 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", vera_fx.PartialCaptureWarning)
        found = [model(input_ids=ids, past_key_values=cache).logits]
        found += [
            model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits for n in range(4)
        ]
    layers = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    return [*found, *(tensor for pair in layers for tensor in pair)]


@pytest.mark.parametrize("kind", ["dynamic", "static", "static window"])
def test_caches_of_ones_own(kind: str, runs: dict[str, int]) -> None:
    base = windowed(5 if kind == "static window" else None)
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs, ours = peft_pair(base, plan="factored", target_modules=targets)
    config: Any = base.config

    def cache() -> Any:
        return DynamicCache() if kind == "dynamic" else StaticCache(config, max_cache_len=ROOM)

    with torch.inference_mode():
        for _ in range(2):  # the second time with the graphs of the first
            held = cache()
            for found, expected in zip(said(ours, held), said(theirs, cache()), strict=True):
                assert_close(found, expected)
            assert int(held.get_seq_length()) == 8
    assert runs == {"graph": 10, "python": 0}
    with torch.no_grad():  # and outside of it
        for found, expected in zip(said(ours, cache()), said(theirs, cache()), strict=True):
            assert_close(found, expected)
    assert runs == {"graph": 15, "python": 0}


def test_generate(runs: dict[str, int]) -> None:
    theirs, ours = peft_pair(windowed(None), plan="factored", target_modules=["q_proj", "v_proj"])
    ids = torch.arange(8).reshape(2, 4) * 7 % 90 + 3
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    static = {**options, "cache_implementation": "static", "disable_compile": True}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", vera_fx.PartialCaptureWarning)
        found, expected = (m.generate(ids, **static) for m in (ours, theirs))
    assert torch.equal(found, expected)
    assert runs == {"graph": 5, "python": 0}
