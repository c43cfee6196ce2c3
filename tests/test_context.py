"""State that belongs to no model has an owner and an end: nothing of a model stays in the process."""

import contextlib
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.models import BY_NAME
from vera_fx import _context

MODELS = ("mlp", "llama", pytest.param("t5", marks=pytest.mark.slow))


def resident() -> dict[str, int]:
    """What is there now; other tests of this process may keep models of their own."""
    torch._dynamo.reset()  # compiled code is torch's, and holds what it was made for
    gc.collect()
    sources = torch.compiler.config.dynamic_sources.split(",")
    return {**_context.residents(), "sources": len([source for source in sources if source])}


def more_than(before: dict[str, int]) -> dict[str, int]:
    """What is there beyond what was; what another test left behind may be gone by now."""
    return {name: n for name, n in resident().items() if n > before[name]}


def used(name: str) -> nn.Module:
    """An adapted model after calls of every kind."""
    family = BY_NAME[name]
    model = vera_fx.adapt(family.build(), vera_fx.VeraConfig(r=3, **family.config))
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=2, **family.config))
    inputs = family.inputs()
    first = next(iter(inputs.values()))
    model(**inputs)
    vera_fx.set_adapter(model, "other")
    torch.compile(model, backend="eager")(**inputs)
    with torch.no_grad():
        model.eval()(**inputs)
        if "labels" not in inputs:
            model(**inputs, adapter_names=["other"] * first.shape[0])
    if family.generates:
        ids = inputs["input_ids"][:2]
        model.generate(ids, max_new_tokens=2, adapter_names=["default", "__base__"])
    return model


def everything_of(model: nn.Module) -> list[weakref.ref[Any]]:
    """What adapting has added to a model."""
    captures = list(model.__dict__["_vera_runtime"].all_captures())
    graphs = [capture.graph for capture in captures]
    adapters = list(model.vera.adapters.values())
    return [
        weakref.ref(x) for x in (model.vera, model.__dict__["_vera_runtime"], *graphs, *adapters)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_stays_after_unload(name: str) -> None:
    before = resident()
    model = used(name)
    traces = everything_of(model)
    assert _context.residents()["classes"] > 0

    vera_fx.unload(model)

    assert more_than(before) == {}
    assert [trace for trace in traces if trace() is not None] == []


@pytest.mark.parametrize("name", MODELS)
def test_nothing_stays_of_a_model_that_is_dropped(name: str) -> None:
    before = resident()
    model = used(name)
    traces = [*everything_of(model), weakref.ref(model)]

    del model

    assert more_than(before) == {}
    assert [trace for trace in traces if trace() is not None] == []


def test_what_a_thread_holds_ends_with_its_block() -> None:
    seen: list[Any] = []
    with _context.holding("names", "mine"):
        thread = threading.Thread(target=lambda: seen.append(_context.now("names")))
        thread.start()
        thread.join()
        with contextlib.suppress(RuntimeError), _context.holding("names", "inner"):
            assert _context.now("names") == "inner"
            raise RuntimeError
        assert _context.now("names") == "mine"

    assert seen == [None]
    assert _context.now("names") is None


def test_a_patch_lasts_while_somebody_needs_it() -> None:
    class Foreign:
        value = 1

    def replacements() -> dict[tuple[Any, str], Any]:
        return {(Foreign, "value"): 2}

    with _context.patched("test", replacements):
        with _context.patched("test", replacements):
            assert Foreign.value == 2
        assert Foreign.value == 2
        assert _context.original("test", Foreign, "value") == 1
    assert Foreign.value == 1


def test_open_dimensions_end_with_their_last_owner() -> None:
    class Owner:
        pass

    first, second = Owner(), Owner()
    _context.open_dimensions(first, [("L_here", 0)])
    _context.open_dimensions(first, [("L_here", 0)])
    _context.open_dimensions(second, [("L_here", 0), ("L_there", 1)])
    del first
    gc.collect()
    assert "L_here:0" in torch.compiler.config.dynamic_sources
    del second
    gc.collect()

    assert "L_here" not in torch.compiler.config.dynamic_sources
