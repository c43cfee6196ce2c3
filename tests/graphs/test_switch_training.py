"""Training one adapter after the other in one compiled model: a switch compiles nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, fill_adapters
from tests.models import llama, text_inputs
from vera_fx import _context

LAYERS = 5


def deep_roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return RobertaModel(config, add_pooling_layer=False)


MODELS = {
    "roberta": (deep_roberta, ["query", "value"]),
    "llama": (lambda: llama(LAYERS), "all-linear"),
}


def adapted(name: str, *names: str, plan: str) -> nn.Module:
    torch.manual_seed(0)
    build, targets = MODELS[name]
    first, *others = names
    config = vera_fx.VeraConfig(r=6, target_modules=targets, plan=plan)
    model = vera_fx.adapt(build(), config, adapter_name=first)
    for other in others:
        vera_fx.add_adapter(model, other, config)
    fill_adapters(model)
    return model.train()


def loss_of(output: Any) -> Tensor:
    return output[0].sin().sum()


def train(model: nn.Module, call: Any, adapter: str, *, zero: bool) -> None:
    """One step of one adapter; its gradients are those of the model in Python."""
    vera_fx.set_adapter(model, adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    inputs = {n: v for n, v in text_inputs().items() if n != "labels"}
    loss = loss_of(call(**inputs))
    loss.backward()
    assert all(p.grad is not None for p in trained)
    assert_close(loss.detach(), loss_of(model(**inputs)).detach(), factor=20)
    torch.optim.AdamW(trained, lr=1e-3).step()
    if zero:
        model.zero_grad()


@pytest.mark.parametrize("outline", ["0", "4"], ids=["flat", "outlined"])
@pytest.mark.parametrize(("name", "plan"), [("roberta", "auto"), ("llama", "scaled")])
def test_one_training_step_compiles_for_all(
    name: str, plan: str, outline: str, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: Any
) -> None:
    monkeypatch.setenv("VERA_FX_OUTLINE", outline)
    model = adapted(name, "a", "b", "c", plan=plan)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(model, compiled, "a", zero=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for zero in (False, True):  # gradients that are there, or gone, at the next step
            for adapter in ("b", "c", "a", "b"):
                train(model, compiled, adapter, zero=zero)
        # An adapter that came later has parameters of its own, of the same sizes.
        vera_fx.add_adapter(model, "late", model.vera.adapter("a").config)
        train(model, compiled, "late", zero=True)
    assert not fresh_dynamo["graph_break"]


def test_the_first_switch_to_another_rank_compiles_nothing(fresh_dynamo: Any) -> None:
    """Ranks are left open when an adapter of another rank comes, not when it is first switched to."""
    model = adapted("llama", "a", plan="auto")
    assert not _context._openers.get(model.vera)
    vera_fx.add_adapter(model, "small", model.vera.adapter("a").config.replace(r=2))
    # Other models of this process may have opened them for all; this one has to by itself.
    assert any("slot" in source for source in _context._openers[model.vera])
    fill_adapters(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {n: v for n, v in text_inputs().items() if n != "labels"}
    loss_of(compiled(**inputs)).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        train(model, compiled, "small", zero=True)
    assert not fresh_dynamo["graph_break"]
