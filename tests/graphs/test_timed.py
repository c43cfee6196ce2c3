"""``plan="timed"``: the plans are timed on this machine, and the fastest is taken."""

import copy

import pytest
import torch

import vera_fx
from tests.helpers import (
    assert_close,
    assert_same_gradients,
    fill_vectors,
    gradients,
    hook_reference,
    main_output,
)
from tests.models import Attention
from vera_fx._torch import generators_kept
from vera_fx.branches.vera.kind import VERA
from vera_fx.graphs import timing
from vera_fx.passes import PLANS, ReadWeight, Target, Workload

CONFIG = vera_fx.VeraConfig(r=5, target_modules=["query", "key", "out"], plan="timed")
X = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))
TARGET = Target("lin", 12, 7, ReadWeight("out_in"), ("lin.weight",))


def test_every_plan_and_the_base_are_timed() -> None:
    costs = timing.TimedCosts(VERA, torch.float32, torch.device("cpu"))
    for trains in (True, False):
        found = costs(100, TARGET, Workload((5,), trains, request="timed"), 3)
        assert found.keys() == {"base", *PLANS}
        assert found["base"] > 0
        # Equal up to the next power of two: no second timing.
        assert costs(128, TARGET, Workload((5,), trains, request="timed"), 3) is found
        assert costs(129, TARGET, Workload((5,), trains, request="timed"), 3) is not found


def test_timing_leaves_the_random_state_alone() -> None:
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    timing.TimedCosts(VERA, torch.float32, torch.device("cpu"))(
        11, TARGET, Workload((5,), trains=True), 1
    )
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_generators_of_the_device_are_kept(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device(kind)
    torch.manual_seed(4)
    expected = torch.rand(2), torch.rand(2, device=device)
    torch.manual_seed(4)
    timing.TimedCosts(VERA, torch.float32, device)(
        13, TARGET, Workload((5,), trains=True, request="timed"), 1
    )
    assert torch.equal(torch.rand(2), expected[0])
    assert torch.equal(torch.rand(2, device=device), expected[1])


def test_the_generator_of_an_accelerator_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    fork = torch.random.fork_rng

    def forked(**given: object) -> object:
        asked.append(given)
        return fork(devices=[])

    monkeypatch.setattr(torch.random, "fork_rng", forked)
    for name in ("cpu", "cuda:1"):
        with generators_kept(torch.device(name)):
            pass

    assert asked == [{"devices": []}, {"devices": [torch.device("cuda:1")], "device_type": "cuda"}]


@pytest.mark.parametrize("fastest", PLANS)
def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    times = {"base": 1.0, **{plan: 0.5 - 0.4 * (plan == fastest) for plan in PLANS}}
    monkeypatch.setattr(timing, "_times", lambda *_: times)
    torch.manual_seed(0)
    base = Attention().eval()
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)
    oracle = hook_reference(base, model)

    assert_close(main_output(model(X)), main_output(oracle(X)), factor=5)
    expected = torch.autograd.grad(oracle(X)[0].sin().sum(), [*model.vera.parameters()])
    found = torch.autograd.grad(model(X)[0].sin().sum(), [*model.vera.parameters()])
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, factor=20)
    (graph,) = vera_fx.explain(model).graphs
    assert {plan for _, plan, _ in graph.plans} == {fastest}
    assert all("12 tokens, timed" in str(why) for _, _, why in graph.plans)


def test_restrictions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("vera_fx.graphs.planning.multiplies_well", lambda *_: True)
    half = vera_fx.adapt(Attention().half().eval(), CONFIG)
    fill_vectors(half)
    half(X.half())
    summed = vera_fx.adapt(Attention().eval(), CONFIG)
    vera_fx.add_adapter(summed, "other")
    vera_fx.set_adapter(summed, ["default", "other"])
    summed(X)

    for model, plans in ((half, {"scaled"}), (summed, {"factored"})):
        (graph,) = vera_fx.explain(model).graphs
        assert {plan for _, plan, _ in graph.plans} == plans


def test_a_real_run_is_right() -> None:
    torch.manual_seed(0)
    base = Attention().train()
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)
    exact = vera_fx.adapt(base, vera_fx.VeraConfig(r=5, target_modules=["query", "key", "out"]))
    fill_vectors(exact)

    found, expected = (gradients(m, lambda m: m(X)) for m in (model, exact))
    assert_same_gradients(found, expected)
