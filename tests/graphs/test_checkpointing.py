"""Gradient checkpointing: the model's own flag is honoured, with the same numbers and less kept."""

import copy

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import (
    assert_close,
    assert_same_gradients,
    fill_vectors,
    gradients,
    kept_tensors,
    peft_pair,
    storage_of,
)
from tests.models import BY_NAME, param_names


def kept_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that a call keeps for backward, parameters and buffers left out."""
    model(**inputs)  # capture first
    own = {storage_of(t) for t in [*model.parameters(), *model.buffers()]}
    own |= {storage_of(t) for t in model.vera.slot0.__dict__.values()}
    found = kept_tensors(lambda: model(**inputs).loss)
    return sum(t.untyped_storage().nbytes() for t in found if storage_of(t) not in own)


WITH_LAYERS = [BY_NAME[name] for name in ("llama", "bert", "gpt2", "opt", "t5")]


@pytest.mark.parametrize("plan", ["factored", "merged"])
@pytest.mark.parametrize("name", param_names("llama", "bert", among=WITH_LAYERS))
def test_same_gradients_with_less_kept(name: str, plan: str) -> None:
    family = BY_NAME[name]
    torch.manual_seed(0)
    base = family.build().train()
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=4, plan=plan, **family.config))
    fill_vectors(model)
    inputs = family.inputs()

    def call(m: nn.Module):
        torch.manual_seed(5)  # dropout, where a family has some
        return m(**inputs)

    plain, loss, before = gradients(model, call), call(model).loss, kept_bytes(model, inputs)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, call)

    assert torch.equal(call(model).loss, loss)
    assert_same_gradients(checkpointed, plain, factor=1)
    assert kept_bytes(model, inputs) < 0.8 * before
    reports = [str(graph.report) for graph in vera_fx.explain(model).graphs]
    assert "CheckpointLayers" in reports[-1]
    model.gradient_checkpointing_disable()
    assert_same_gradients(gradients(model, call), plain, factor=1)


def test_gradients_are_pefts() -> None:
    family = BY_NAME["llama"]
    torch.manual_seed(0)
    theirs, ours = peft_pair(family.build().train(), **family.config)
    for model in (theirs, ours):
        model.gradient_checkpointing_enable()

    def call(model: nn.Module):
        return model(**family.inputs())

    assert torch.equal(call(theirs).logits, call(ours).logits)
    assert_same_gradients(gradients(ours, call), gradients(theirs, call))


def test_compiled_fullgraph() -> None:
    family = BY_NAME["llama"]
    torch.manual_seed(0)
    model = vera_fx.adapt(family.build().train(), vera_fx.VeraConfig(r=4, **family.config))
    fill_vectors(model)
    model.gradient_checkpointing_enable()

    def call(m: nn.Module):
        return m(**family.inputs())

    expected = gradients(model, call)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    values = torch.autograd.grad(
        call(compiled).loss, [p for p in model.parameters() if p.requires_grad]
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == len(expected)
    for value, wanted in zip(values, expected.values(), strict=True):
        assert_close(value, wanted, factor=10)


def test_replaced_parameters_are_read_live() -> None:
    family = BY_NAME["llama"]
    torch.manual_seed(0)
    model = vera_fx.adapt(family.build().train(), vera_fx.VeraConfig(r=4, **family.config))
    fill_vectors(model)
    model.gradient_checkpointing_enable()
    first = model(**family.inputs()).loss
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(copy.deepcopy(layer.weight.data) * 2, requires_grad=False)

    assert not torch.equal(model(**family.inputs()).loss, first)
    layer.weight.data.mul_(0.5)
    assert torch.equal(model(**family.inputs()).loss, first)
