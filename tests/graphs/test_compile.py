"""torch.compile: one graph per signature, no graph break, no second recompile."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import vera_fx
from tests.graphs.compiling import assert_fullgraph
from tests.helpers import assert_close, fill_vectors, gradients, loss_of, vectors_of
from tests.models import BY_NAME, Family, params

# Inductor is exercised on two families; the others go through AOTAutograd alone, which is where
# fullgraph, guards and dynamic shapes are decided.
WITH_INDUCTOR = ("llama", "mlp")


def adapted(family: Family) -> nn.Module:
    torch.manual_seed(0)
    model = vera_fx.adapt(family.build(), vera_fx.VeraConfig(r=6, **family.config))
    fill_vectors(model)
    return model


@pytest.mark.parametrize("family", params("mlp", "llama"))
def test_fullgraph_without_breaks_or_second_recompiles(family: Family, fresh_dynamo) -> None:
    assert_fullgraph(family, adapted(family), "aot_eager")


@pytest.mark.parametrize("family", params("mlp", among=[BY_NAME[name] for name in WITH_INDUCTOR]))
def test_fullgraph_with_inductor(family: Family, fresh_dynamo) -> None:
    assert_fullgraph(family, adapted(family), "inductor")


@pytest.mark.parametrize("name", WITH_INDUCTOR)
def test_compiled_gradients_agree(name: str, fresh_dynamo) -> None:
    family = BY_NAME[name]
    model = adapted(family).eval()
    compiled = torch.compile(model, fullgraph=True)
    inputs = family.inputs()
    expected = gradients(model, lambda m: m(**inputs))
    values = torch.autograd.grad(loss_of(compiled(**inputs)), list(vectors_of(model).values()))

    for (vector, value), actual in zip(expected.items(), values, strict=True):
        assert_close(actual, value, factor=50, what=vector)


@pytest.mark.filterwarnings("ignore:.*graphs of Scaled have been captured")
def test_more_signatures_than_the_recompile_limit(fresh_dynamo) -> None:
    """Each signature has a code object of its own, so they never use up Dynamo's limit of 8."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 5)

        def forward(self, x: Tensor, scale: int) -> Tensor:
            return self.lin(x) * scale

    model = vera_fx.adapt(Scaled(), vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(4, 3)

    for scale in range(2, 14):
        assert torch.equal(compiled(x, scale), model.lin(x) * scale)


def test_compile_in_place_and_generate(fresh_dynamo) -> None:
    family = BY_NAME["llama"]
    model = adapted(family).eval()
    prompt = {"input_ids": family.inputs()["input_ids"], "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**prompt)
    model.compile(fullgraph=True, backend="aot_eager")

    assert torch.equal(model.generate(**prompt), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(model.generate(**prompt), expected)
    assert not fresh_dynamo["graph_break"]


def test_cached_call_under_compile(fresh_dynamo) -> None:
    family = BY_NAME["t5"]
    model = adapted(family).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = family.inputs()["input_ids"]
    result = compiled(input_ids=ids, decoder_input_ids=ids, use_cache=True)

    assert result.past_key_values.get_seq_length() == ids.shape[1]


def test_inside_another_compiled_function(fresh_dynamo) -> None:
    """Called from a larger compiled function the graph break is at our door, and harmless."""
    model = adapted(BY_NAME["mlp"]).eval()
    x = torch.randn(4, 10)

    @torch.compile(backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        return model(x * 2).sum() + 1

    assert_close(step(x), model(x * 2).sum() + 1)


def test_switching_adapters_does_not_recompile(fresh_dynamo) -> None:
    family = BY_NAME["bert"]
    torch.manual_seed(0)
    config = vera_fx.VeraConfig(r=6, target_modules=["query", "value"])
    model = vera_fx.adapt(family.build().eval(), config)
    vera_fx.add_adapter(model, "other")
    fill_vectors(model)
    with torch.no_grad():
        for p in model.vera.adapters["other"].parameters():
            p.mul_(-2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    inputs = family.inputs()
    with torch.no_grad():
        first = compiled(**inputs).logits
        with torch.compiler.set_stance("fail_on_recompile"):
            vera_fx.set_adapter(model, "other")
            second = compiled(**inputs).logits
            assert_close(second, model(**inputs).logits)
            vera_fx.set_adapter(model, "default")
            assert torch.equal(compiled(**inputs).logits, first)

    assert not torch.equal(first, second)
    assert counter.frame_count == 1


class Choosy(nn.Module):
    """Cannot be captured whole; ``block`` can."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() > 0 else self.block(-x)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in parts"])
@pytest.mark.filterwarnings("ignore::vera_fx.PartialCaptureWarning")
def test_many_models_in_one_process(whole: bool, fresh_dynamo) -> None:
    """A code object is compiled eight times at most, so no code may run between all models' calls."""
    for number in range(10):
        base = Choosy(5 + number)
        base = base.block if whole else base
        model = vera_fx.adapt(base, vera_fx.VeraConfig(r=2, target_modules=["0"]))
        fill_vectors(model)
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, fullgraph=whole, backend=counter)
        for rows in (3, 5):
            x = torch.randn(rows, 4)
            assert_close(compiled(x), model(x))
        assert 1 <= counter.frame_count <= 2
