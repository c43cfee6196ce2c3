"""Modules inside of an adapted model that are called past its own forward: graphs of their own, or a warning."""

import copy
import pickle
import types
import warnings

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import (
    assert_close,
    assert_far_apart,
    assert_same_gradients,
    fill_vectors,
    gradients,
    graphs_run,
    hook_reference,
    peft_pair,
)
from tests.models import llama, t5, tokens

IDS = tokens()
CONFIG = {"target_modules": ["q_proj", "down_proj"]}


def chunked(self: nn.Module, input_ids: Tensor) -> Tensor:
    """What trainers put on a model's object: the base model first, then a loss of their own."""
    hidden = self.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return self.lm_head(hidden[:, :-1])


def with_forward(model: nn.Module, forward=chunked) -> nn.Module:
    model.forward = types.MethodType(forward, model)
    return model


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return llama()


def adapted(base: nn.Module, plan: str = "factored") -> nn.Module:
    model = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(r=5, plan=plan, **CONFIG))
    fill_vectors(model)
    return model


def captures(model: nn.Module) -> int:
    return len(vera_fx.explain(model).graphs)


@pytest.mark.parametrize("plan", ["factored", "merged"])
def test_a_forward_on_the_object_runs_a_graph(base: nn.Module, plan: str) -> None:
    model = with_forward(adapted(base, plan))
    oracle = with_forward(hook_reference(base, adapted(base)))
    found = model(IDS)
    assert captures(model) == 1
    assert_close(found, oracle(IDS), factor=5)
    assert_far_apart(found, chunked(base, IDS))
    other = with_forward(adapted(base))
    assert_same_gradients(
        gradients(model, lambda m: m(IDS)), gradients(other, lambda m: m(IDS)), factor=20
    )


def test_gradients_are_pefts(base: nn.Module) -> None:
    theirs, ours = peft_pair(base, r=5, **CONFIG)
    with_forward(ours)
    expected = gradients(theirs, lambda m: chunked(m.base_model.model, IDS))
    assert_same_gradients(gradients(ours, lambda m: m(IDS)), expected)
    assert captures(ours) == 1


def test_the_base_model_alone(base: nn.Module) -> None:
    model = adapted(base)
    found = model.model(input_ids=IDS).last_hidden_state
    assert captures(model) == 1
    assert_close(found, hook_reference(base, model).model(input_ids=IDS).last_hidden_state)
    with graphs_run() as count, torch.no_grad():
        model.eval().model(input_ids=IDS)
        model.model(input_ids=IDS)
    assert count() == 2


def test_the_models_own_call_is_one_graph(base: nn.Module) -> None:
    model = adapted(base)
    with graphs_run() as count:
        model(input_ids=IDS)
    assert (captures(model), count()) == (1, 1)


def test_switched_off_and_switched(base: nn.Module) -> None:
    """As a reference model for preferences: the plain base."""
    model = with_forward(adapted(base))
    with vera_fx.disable_adapters(model), torch.no_grad():
        assert torch.equal(model(IDS), chunked(base, IDS))
    vera_fx.add_adapter(model, "other")
    fill_vectors(model)
    vera_fx.set_adapter(model, "other")
    assert_close(model(IDS), chunked(hook_reference(base, model), IDS))


def test_copies_pickles_and_unloading(base: nn.Module) -> None:
    model = adapted(base)
    expected = chunked(model, IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with graphs_run() as count:
            assert torch.equal(chunked(twin, IDS), expected)
        assert count() == 1
        with torch.no_grad():
            for vectors in twin.vera.parameters():
                vectors.zero_()
        assert not torch.equal(chunked(twin, IDS), expected)
    assert torch.equal(chunked(model, IDS), expected)
    plain = vera_fx.unload(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    assert torch.equal(chunked(plain, IDS), chunked(base, IDS))


def test_hooks_of_an_entry_run_once(base: nn.Module) -> None:
    model = adapted(base)
    calls: list[str] = []
    model.model.register_forward_hook(lambda *_: calls.append("after"))
    with graphs_run() as count:
        model.model(input_ids=IDS)
    assert (calls, count()) == (["after"], 1)


def test_an_entry_that_cannot_be_captured_has_parts(base: nn.Module) -> None:
    model = adapted(base)
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.warns(vera_fx.PartialCaptureWarning, match="'model' in LlamaForCausalLM cannot"):
        found = chunked(model, IDS)
    assert captures(model) == 2
    assert_close(found, chunked(hook_reference(base, model), IDS))


def test_encoders_in_generate_run_graphs() -> None:
    torch.manual_seed(0)
    base = t5().eval()
    model = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(r=5, target_modules=["q", "wo"]))
    fill_vectors(model)
    with torch.no_grad():
        found = model.encoder(input_ids=IDS).last_hidden_state
        expected = hook_reference(base, model).encoder(input_ids=IDS).last_hidden_state
    assert captures(model) == 1
    assert_close(found, expected, factor=5)


class Plain(nn.Module):
    """Nothing says which of its modules others would call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_a_call_that_runs_no_graph_warns_once() -> None:
    base, x = Plain(), torch.randn(2, 4)
    config = vera_fx.VeraConfig(r=5, target_modules=["first", "second"])
    model = vera_fx.adapt(copy.deepcopy(base), config)
    fill_vectors(model)
    with_forward(model, lambda self, x: self.second(self.first(x).sin()))
    with pytest.warns(vera_fx.PartialCaptureWarning, match="'first' runs in Python") as found:
        y = model(x)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    oracle = hook_reference(base, model)
    assert_close(y, oracle.second(oracle.first(x).sin()))


def test_a_wrapper_that_calls_the_forward_does_not_warn() -> None:
    """As accelerate's for mixed precision."""
    x = torch.randn(2, 4)
    model = vera_fx.adapt(Plain(), vera_fx.VeraConfig(r=5, target_modules=["first"]))
    inner = model.forward
    with_forward(model, lambda _, x: inner(x) * 2)
    with warnings.catch_warnings(), graphs_run() as count:
        warnings.simplefilter("error")
        model(x)
    assert count() == 1
