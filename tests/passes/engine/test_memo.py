"""What passes find out once for all sites: as true as what they would find out for each."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import vera_fx
from tests.models import llama, text_inputs
from vera_fx.graphs.runtime import runtime_of
from vera_fx.passes.engine import emit as emit_module
from vera_fx.passes.engine.memo import Memo


def looks(model: nn.Module) -> Iterator[tuple[object, ...]]:
    """Every node of the model's adapted graph, with all that its value says."""
    for capture in runtime_of(model).all_captures():
        for variants in capture.variants.values():
            for variant in variants.values():
                for node in variant.graph.graph.nodes:
                    value = node.meta.get("val")
                    if isinstance(value, torch.Tensor):
                        sizes = str(tuple(value.shape)), str(value.stride())
                        yield node.name, str(node.target), *sizes, value.dtype, value.device


def adapted(plan: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = vera_fx.VeraConfig(r=6, target_modules="all-linear", plan=plan)
    model = vera_fx.adapt(llama().to(dtype), config)
    model(**text_inputs())
    return model


class Forgetful(Memo):
    def value(self, key, make):
        return make()

    def attributes(self, graph):
        self._attributes = self._top = None
        return super().attributes(graph)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["factored", "scaled", "merged"])
def test_graphs_are_those_without_it(
    plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [*looks(adapted(plan, dtype))]
    asked: list[object] = []
    for name in ("insert_branches", "merge_weight", "scale_branch", "lower_branch"):
        module = __import__(f"vera_fx.passes.{name}", fromlist=["Memo"])
        monkeypatch.setattr(module, "Memo", lambda: asked.append(1) or Forgetful())
    expected = [*looks(adapted(plan, dtype))]
    assert asked
    assert len(found) > 100
    assert found == expected


def test_operators_run_once_for_sites_that_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the layers, no more runs on fake tensors."""

    def runs(layers: int) -> int:
        count: list[int] = []
        real = emit_module.on_fakes
        with monkeypatch.context() as patch:
            patch.setattr(emit_module, "on_fakes", lambda *a: count.append(1) or real(*a))
            patch.setenv("VERA_FX_VERIFY", "0")
            torch.manual_seed(0)
            config = vera_fx.VeraConfig(r=6, target_modules="all-linear", plan="merged")
            vera_fx.adapt(llama(layers), config)(**text_inputs())
        return len(count)

    once = runs(1)
    assert once
    assert runs(3) == once
