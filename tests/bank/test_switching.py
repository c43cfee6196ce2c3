"""Switching, adding, loading, deleting, disabling on a compiled model: no recompile, no recapture.

What must be compiled once, and why, is here too: a test for each case.
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import vera_fx
from tests.helpers import assert_close, assert_far_apart, vectors_of
from tests.models import MLP
from vera_fx.passes import PLANS

X = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))
KINDS: dict[str, dict[str, Any]] = {
    "first": {},
    "same": {},
    "smaller": {"r": 3},
    "larger": {"r": 17, "projection_prng_key": 4},
    "one target": {"target_modules": ["lin0"]},
    "other target": {"target_modules": ["lin1"], "r": 2},
    "dropout": {"vera_dropout": 0.5},
    "head": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    "biases": {"bias": "all"},
}


def config(plan: str = "factored", **options: Any) -> vera_fx.VeraConfig:
    return vera_fx.VeraConfig(
        **{"r": 5, "target_modules": ["lin0", "lin1"], "plan": plan, **options}
    )


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(model.vera.parameters()):
            generator = torch.Generator().manual_seed(index + 1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def adapted(*kinds: str, plan: str = "factored") -> nn.Module:
    torch.manual_seed(0)
    first, *others = kinds
    model = vera_fx.adapt(MLP().eval(), config(plan, **KINDS[first]), adapter_name=first)
    for name in others:
        vera_fx.add_adapter(model, name, config(plan, **KINDS[name]))
    fill(model)
    return model


def by_modules(model: nn.Module, x: Tensor = X) -> Tensor:
    """What the active adapters compute, module by module, without any graph."""
    return model.lin1(model.drop(torch.tanh(model.lin0(x))))


class Compiled:
    """A model under torch.compile, and how many graphs it made."""

    def __init__(self, model: nn.Module) -> None:
        torch._dynamo.reset()
        gc.collect()  # what other models have opened ends with them
        model.vera.rebind()
        self.model = model
        self.counter = CompileCounterWithBackend("aot_eager")
        self.call = torch.compile(model, fullgraph=True, backend=self.counter)

    def check(self, x: Tensor = X) -> Tensor:
        result = self.call(x)
        assert_close(result, by_modules(self.model, x), factor=5)
        return result

    @contextlib.contextmanager
    def expecting(self, graphs: int) -> Iterator[None]:
        """The block compiles so many graphs, and captures nothing."""
        before = self.counter.frame_count, self.captures
        with torch.compiler.set_stance("default" if graphs else "fail_on_recompile"):
            yield
        assert (self.counter.frame_count - before[0], self.captures) == (graphs, before[1])

    @property
    def captures(self) -> int:
        return len(list(self.model._vera_runtime.all_captures()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("plan", PLANS)
def test_one_graph_serves_adapters_of_every_kind(plan: str, mode: Callable[[], Any]) -> None:
    compiled = Compiled(adapted(*KINDS, plan=plan))
    with mode():
        first = compiled.check()
        with compiled.expecting(graphs=0):
            for name in [*KINDS, *reversed(KINDS)]:
                vera_fx.set_adapter(compiled.model, name)
                result = compiled.check()
                if name != "first":
                    assert_far_apart(result, first)
    assert compiled.captures == 1


def test_adapters_come_and_go(tmp_path: Path) -> None:
    model = adapted("first", "head")
    vera_fx.save_adapter(model, tmp_path / "saved", adapter_name="first")
    compiled = Compiled(model)
    with torch.no_grad():
        compiled.check()
        with vera_fx.disable_adapters(model):
            compiled.check()
        with compiled.expecting(graphs=0):
            for name in ("same", "smaller", "one target", "dropout"):
                vera_fx.add_adapter(model, name, config(**KINDS[name]))
                fill(model)
                vera_fx.set_adapter(model, name)
                compiled.check()
            # Loaded for inference: its parameters never require gradients, those of others do.
            vera_fx.load_adapter(model, tmp_path / "saved", adapter_name="loaded", plan="factored")
            vera_fx.set_adapter(model, "loaded")
            compiled.check()
            with vera_fx.disable_adapters(model):
                assert_far_apart(compiled.check(), compiled.call(X) + 1)
            for name in ("same", "first", "head"):
                vera_fx.delete_adapter(model, name)
                compiled.check()
            with pytest.warns(UserWarning, match="No adapter is active now"):
                vera_fx.delete_adapter(model, "loaded")
            compiled.check()
            vera_fx.add_adapter(model, "same", config(r=2))
            fill(model)
            vera_fx.set_adapter(model, "same")
            compiled.check()


def test_sums_of_adapters() -> None:
    compiled = Compiled(adapted("first", "smaller", "one target", "head"))
    with torch.no_grad():
        vera_fx.set_adapter(compiled.model, ["first", "smaller"])
        compiled.check()
        with compiled.expecting(graphs=0):
            for names in (["one target", "smaller"], ["smaller", "first"], ["first", "head"]):
                vera_fx.set_adapter(compiled.model, names)
                compiled.check()


def test_a_new_target_and_a_new_copy_are_compiled_once() -> None:
    """They change the graph: a branch, or the place that a weight is read from. Never again after."""
    compiled = Compiled(adapted("one target"))
    grown = {"first": {}, "head": {"modules_to_save": ["lin1"], "target_modules": ["lin0"]}}
    with torch.no_grad():
        compiled.check()
        for name, options in grown.items():
            vera_fx.add_adapter(compiled.model, name, config(**options))
            fill(compiled.model)
            with compiled.expecting(graphs=1):
                compiled.check()
        with compiled.expecting(graphs=0):
            for name in ("first", "head", "one target"):
                vera_fx.set_adapter(compiled.model, name)
                compiled.check()
            for name in ("first", "head"):
                vera_fx.delete_adapter(compiled.model, name)
                compiled.check()


def test_rank_one_has_a_graph_of_its_own() -> None:
    compiled = Compiled(adapted("first", "smaller"))
    vera_fx.add_adapter(compiled.model, "thin", config(r=1))
    fill(compiled.model)
    with torch.no_grad():
        compiled.check()
        vera_fx.set_adapter(compiled.model, "thin")
        with compiled.expecting(graphs=1):
            compiled.check()
        with compiled.expecting(graphs=0):
            for name in ("smaller", "thin", "first"):
                vera_fx.set_adapter(compiled.model, name)
                compiled.check()


def gradients(model: nn.Module, result: Tensor) -> dict[str, Tensor]:
    vectors = {n: p for n, p in vectors_of(model).items() if p.requires_grad}
    return dict(
        zip(vectors, torch.autograd.grad(result.square().sum(), vectors.values()), strict=True)
    )


@pytest.mark.parametrize("plan", PLANS)
def test_training_any_adapter_of_the_same_targets(plan: str) -> None:
    model = adapted("first", "same", "smaller", "larger", plan=plan)
    compiled = Compiled(model)
    gradients(model, compiled.check())
    with compiled.expecting(graphs=0):
        for name in ("same", "smaller", "larger", "first"):
            vera_fx.set_adapter(model, name)
            actual, expected = (
                gradients(model, compiled.call(X)),
                gradients(model, by_modules(model)),
            )
            assert len(expected) == 4
            for key, value in expected.items():
                assert_close(actual[key], value, factor=20, what=key)


def test_with_gradients_the_second_rank_is_compiled_once() -> None:
    """Ranks stay fixed in training, which is faster, until a bank has two of them."""
    compiled = Compiled(adapted("first"))
    gradients(compiled.model, compiled.check())
    for name, graphs in (("smaller", 1), ("larger", 0)):
        vera_fx.add_adapter(compiled.model, name, config(**KINDS[name]))
        fill(compiled.model)
        vera_fx.set_adapter(compiled.model, name)
        with compiled.expecting(graphs):
            gradients(compiled.model, compiled.check())


class Deep(nn.Module):
    """Layers that are equal, which become calls of one function where gradients are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("outline", ["4", "0"])
@pytest.mark.parametrize("grad", [True, False])
def test_deep_models_switch_between_ranks(
    grad: bool, outline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERA_FX_OUTLINE", outline)
    torch.manual_seed(0)
    ranks = {"first": 4, "second": 3, "third": 9}
    model = Deep().eval()
    for name, rank in ranks.items():
        options = vera_fx.VeraConfig(r=rank, target_modules="all-linear", plan="factored")
        if name == "first":
            vera_fx.adapt(model, options, adapter_name=name)
        else:
            vera_fx.add_adapter(model, name, options)
    fill(model)
    compiled = Compiled(model)

    def check(x: Tensor) -> None:
        expected = x
        for layer in model.layers:
            expected = layer[1](layer[0](expected))
        result = compiled.call(x)
        assert_close(result, expected, factor=5)
        if grad:
            actual, wanted = gradients(model, result), gradients(model, expected)
            for key, value in wanted.items():
                assert_close(actual[key], value, factor=20, what=key)

    with torch.set_grad_enabled(grad):
        check(torch.randn(4, 6))
        with compiled.expecting(graphs=0):
            for name in ("second", "third", "first"):
                vera_fx.set_adapter(model, name)
                check(torch.randn(4, 6))


def test_with_gradients_other_trained_tensors_are_compiled_once(tmp_path: Path) -> None:
    """A backward graph is made for the tensors that train."""
    model = adapted("first", "one target", "head")
    vera_fx.save_adapter(model, tmp_path / "saved", adapter_name="first")
    vera_fx.load_adapter(model, tmp_path / "saved", adapter_name="frozen", plan="factored")
    compiled = Compiled(model)
    compiled.check()
    for name in ("one target", "head", "frozen"):
        vera_fx.set_adapter(model, name)
        with compiled.expecting(graphs=1):
            compiled.check()
    with compiled.expecting(graphs=0):
        for name in ("first", "head", "frozen", "one target"):
            vera_fx.set_adapter(model, name)
            compiled.check()


def test_an_adapter_that_asks_for_a_plan_gets_it() -> None:
    """Also right after another adapter was served for the same sizes by another plan."""
    model = adapted("first", plan="merged")
    vera_fx.add_adapter(model, "exact", config("factored", r=3))
    fill(model)
    with torch.no_grad():
        model(X)
        vera_fx.set_adapter(model, "exact")
        assert torch.equal(model(X), by_modules(model))
    plans = [{plan for _, plan, _ in graph.plans} for graph in vera_fx.explain(model).graphs]
    assert plans == [{"merged"}, {"factored"}]


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=getattr(module, name).requires_grad))


def assign_data(module: nn.Module, name: str, value: Tensor) -> None:
    getattr(module, name).data = value


def write(module: nn.Module, name: str, value: Tensor) -> None:
    with torch.no_grad():
        getattr(module, name).copy_(value)


@pytest.mark.parametrize("change", [assign, assign_data, write])
@pytest.mark.parametrize("grad", [True, False])
def test_slots_follow_what_modules_hold(change: Any, grad: bool) -> None:
    """Whatever is put into an adapter, its copies, the projections or the base counts at once."""
    model = adapted("first", "head")
    bank = model.vera
    with torch.set_grad_enabled(grad):
        for name, module, tensor in (
            ("first", bank.adapter("first").vectors_at("lin1"), "vera_lambda_b"),
            ("first", bank.adapter("first").vectors_at("lin0"), "vera_lambda_d"),
            ("first", model.lin1, "weight"),
            ("head", bank.adapter("head").copies.by_path["lin1"], "bias"),
        ):
            vera_fx.set_adapter(model, name)
            before = model(X)
            change(module, tensor, getattr(module, tensor).detach() * -2 + 1)
            assert_far_apart(model(X), before)
            assert_close(model(X), by_modules(model))
            vera_fx.set_adapter(model, "head" if name == "first" else "first")
            assert_close(model(X), by_modules(model))


def test_functional_calls_see_their_vectors() -> None:
    model = adapted("first")
    given = {n: p.detach() * -2 for n, p in model.named_parameters() if "vera_lambda" in n}
    before = model(X)
    result = torch.func.functional_call(model, given, (X,))
    assert_far_apart(result, before)
    assert torch.equal(model(X), before)
    with torch.no_grad():
        for name, value in given.items():
            model.get_parameter(name).copy_(value)
    assert torch.equal(model(X), result)


def test_copies_of_a_model_switch_on_their_own() -> None:
    model = adapted("first", "head")
    with torch.no_grad():
        model(X)
        twin = copy.deepcopy(model)
        vera_fx.set_adapter(twin, "head")
        fill(model)
        for each in (twin, model):
            for parameter in each.lin1.parameters():
                parameter.add_(1)
            assert_close(each(X), by_modules(each))


def test_a_sum_where_one_adapter_replaces_what_another_targets() -> None:
    model = adapted("first", "head")
    vera_fx.set_adapter(model, ["first", "head"])
    with torch.no_grad():
        both = model(X)
        assert_close(both, by_modules(model))
        vera_fx.set_adapter(model, "head")
        assert_far_apart(model(X), both)  # the branch of "first" at lin1 did count


def test_a_switch_touches_nothing_that_grows_with_the_model() -> None:
    """Between adapters that only serve: the same steps for two layers and for two hundred."""

    def steps(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        model = vera_fx.adapt(model, vera_fx.VeraConfig(r=2, target_modules="all-linear"))
        vera_fx.add_adapter(model, "other")
        for name in vera_fx.adapter_names(model):
            adapter = model.vera.adapter(name)
            adapter.requires_grad_(False)
            adapter.trainable = False
            vera_fx.set_adapter(model, name)
        return count_calls(lambda: vera_fx.set_adapter(model, "default"))

    assert steps(2) == steps(200) < 200


def count_calls(function: Callable[[], None]) -> int:
    """How many functions run, Python's and C's."""
    import sys

    seen: list[str] = []
    sys.setprofile(lambda frame, event, arg: seen.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(event in {"call", "c_call"} for event in seen)
