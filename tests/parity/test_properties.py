"""Random models and shapes: the adapted graph is the eager definition, gradients included."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vera_fx
from tests.helpers import (
    assert_close,
    assert_far_apart,
    assert_same_gradients,
    fill_vectors,
    gradients,
    hook_reference,
    input_gradient,
    loss_of,
    vectors_of,
)
from tests.strategies import Case, cases


def adapted(case: Case) -> torch.nn.Module:
    model = vera_fx.adapt(copy.deepcopy(case.model), case.config)
    fill_vectors(model)
    return model


@given(cases())
def test_graph_is_the_eager_definition(case: Case) -> None:
    model = adapted(case)
    oracle = hook_reference(case.model, model)
    expected = oracle(case.x)

    assert_close(model(case.x), expected, what="output")
    assert_far_apart(expected, case.model(case.x))
    vectors = vectors_of(model)
    values = torch.autograd.grad(loss_of(expected), list(vectors.values()), allow_unused=True)
    reference = {
        name: torch.zeros_like(p) if value is None else value
        for (name, p), value in zip(vectors.items(), values, strict=True)
    }
    assert_same_gradients(gradients(model, lambda m: m(case.x)), reference)
    assert_close(input_gradient(model, case.x), input_gradient(oracle, case.x), factor=10)


@given(cases())
def test_every_target_is_adapted_and_reported(case: Case) -> None:
    model = adapted(case)
    model(case.x)
    (graph,) = vera_fx.explain(model).graphs
    sites = {site.partition("#")[0] for site in graph.sites}

    assert sites == set(case.config.target_modules)


@given(cases(plans=("factored",)))
def test_fresh_adapter_is_the_base_bit_for_bit(case: Case) -> None:
    model = vera_fx.adapt(copy.deepcopy(case.model), case.config)

    assert torch.equal(model(case.x), case.model(case.x))


@given(cases())
def test_only_vectors_train(case: Case) -> None:
    model = adapted(case)
    loss_of(model(case.x)).backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}

    assert trained == {n for n, _ in model.named_parameters() if "vera_lambda" in n}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@given(cases(), st.integers(1, 4))
def test_other_sizes_run_the_right_graph(case: Case, size: int) -> None:
    model = adapted(case)
    oracle = hook_reference(case.model, model)
    for x in (case.x, torch.randn(size, *case.x.shape[1:], dtype=case.x.dtype), case.x):
        if x.shape[-1] == case.x.shape[-1]:
            assert_close(model(x), oracle(x), what=str(tuple(x.shape)))


@settings(max_examples=12)
@given(cases(dtype=torch.float32))
def test_compiled_equals_eager(case: Case) -> None:
    torch._dynamo.reset()
    model = adapted(case)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    assert_close(compiled(case.x), model(case.x), what="compiled")
    if case.x.numel():
        values = torch.autograd.grad(loss_of(compiled(case.x)), list(vectors_of(model).values()))
        actual = dict(zip(vectors_of(model), values, strict=True))
        assert_same_gradients(actual, gradients(model, lambda m: m(case.x)))
