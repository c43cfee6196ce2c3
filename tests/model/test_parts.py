"""Models that cannot be captured whole: their forward runs in Python, their parts run graphs."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import vera_fx
from tests.helpers import (
    assert_close,
    assert_far_apart,
    assert_same_gradients,
    fill_vectors,
    gradients,
    hook_reference,
)

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.up(x).tanh()))


class Halting(nn.Module):
    """Runs its blocks until the values have grown: control flow that depends on tensor values."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 5)
        self.gate = nn.Linear(6, 1)

    def forward(self, x: Tensor, limit: float = 1.4) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.gate(x).abs().mean() * 0 + x.abs().mean() > limit:
                break
        return self.head(x)


CONFIG = vera_fx.VeraConfig(r=3, target_modules=["up", "down", "head", "gate"], plan="factored")
PARTS = "blocks.0', 'blocks.1', 'blocks.2"


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Halting()


@pytest.fixture
def model(base: nn.Module) -> nn.Module:
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)
    with pytest.warns(vera_fx.PartialCaptureWarning, match=PARTS):
        model.eval()(X)
    return model


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_outputs_and_gradients_agree(
    base: nn.Module, model: nn.Module, train: bool, scale: float
) -> None:
    """The scales take different ways through the forward."""
    model.train(train)
    oracle = hook_reference(base.train(train), model)

    def call(m: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return m(X * scale)

    assert_close(call(model), call(oracle))
    assert_far_apart(call(model), base(X * scale))
    expected = torch.autograd.grad(
        call(oracle).square().sum(), list(model.vera.parameters()), allow_unused=True
    )
    found = torch.autograd.grad(
        call(model).square().sum(), list(model.vera.parameters()), allow_unused=True
    )
    assert any(g is not None for g in found)
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            assert_close(actual, wanted, factor=10)


def test_parts_run_graphs_with_all_plans(base: nn.Module) -> None:
    config = vera_fx.VeraConfig(r=3, target_modules=["up", "down"], plan="merged")
    model = vera_fx.adapt(copy.deepcopy(base).eval(), config)
    fill_vectors(model)
    with pytest.warns(vera_fx.PartialCaptureWarning, match="1 more|blocks.2"):
        model(X)
    assert_close(model(X), hook_reference(base.eval(), model)(X))

    report = vera_fx.explain(model)
    assert report.python[0][0] == ""
    assert "runs in Python: the model" in str(report)
    assert {plan for graph in report.graphs for _, plan, _ in graph.plans} == {"merged"}


def test_it_warns_once(model: nn.Module, recwarn: pytest.WarningsRecorder) -> None:
    model(X)
    model(X[:2] * 3)
    assert not recwarn.list


def test_compiled_parts(model: nn.Module, fresh_dynamo) -> None:
    expected = gradients(model, lambda m: m(X))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_close(compiled(X), model(X))
    assert counter.frame_count > 0
    warm = counter.frame_count
    found = gradients(model, lambda _: compiled(X))
    assert_same_gradients(found, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(compiled(X), model(X))
    assert counter.frame_count == warm
    assert not fresh_dynamo["graph_break"]


def test_adapters_switch_and_disable(base: nn.Module, model: nn.Module) -> None:
    first = model(X)
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=2, target_modules=["up"]))
    vera_fx.set_adapter(model, "other")
    with torch.no_grad():
        for p in model.vera.adapters["other"].parameters():
            p.normal_()
    assert_close(model(X), hook_reference(base.eval(), model)(X))
    vera_fx.set_adapter(model, "default")
    assert torch.equal(model(X), first)
    with vera_fx.disable_adapters(model), torch.no_grad():
        assert torch.equal(model(X), base.eval()(X))
    vera_fx.merge(model)
    assert_close(model(X), first, factor=20)


def test_trained_heads_and_biases(base: nn.Module) -> None:
    config = vera_fx.VeraConfig(
        r=3, target_modules=["up"], modules_to_save=["head"], bias="vera_only", plan="factored"
    )
    model = vera_fx.adapt(copy.deepcopy(base).eval(), config)
    fill_vectors(model)
    with torch.no_grad():
        for path, module in model.vera.adapters["default"].copies.by_path.items():
            module.bias.add_(0.5 if path == "head" else 0.25)
    with pytest.warns(vera_fx.PartialCaptureWarning):
        found = model(X)
    assert_close(found, vera_fx.unload(copy.deepcopy(model), merge=True)(X), factor=10)


def test_mixtures_are_refused(model: nn.Module) -> None:
    with pytest.raises(vera_fx.CaptureError, match="cannot capture Halting"):
        model(X, adapter_names=["default", "__base__", "default", "default"])
    with pytest.raises(vera_fx.CaptureError, match="cannot become a program"):
        vera_fx.export_program(model, (X,))


def test_copies_pickles_and_unloading(base: nn.Module, model: nn.Module) -> None:
    expected = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(vera_fx.PartialCaptureWarning):
            assert torch.equal(twin(X), expected)
        with torch.no_grad():
            twin.vera.adapters["default"].vectors_at("blocks.0.up").vera_lambda_b.zero_()
        assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)
    plain = vera_fx.unload(model)
    assert {type(m) for m in plain.modules()} == {type(m) for m in base.modules()}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules())
    with torch.no_grad():
        assert torch.equal(plain(X), base.eval()(X))


def test_a_part_called_directly_is_adapted(base: nn.Module, model: nn.Module) -> None:
    found = model.blocks[0](X)
    assert_close(found, hook_reference(base.eval(), model).blocks[0](X))
    assert_far_apart(found, base.blocks[0](X))


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: F.linear(x, m.head.weight),
        lambda m, x: x @ m.head.weight.T,
        lambda m, x: torch.cat([x, m.head.weight]).sum() + x,
        lambda m, x: x + m.head.bias.sum(),
    ],
    ids=["linear", "matmul", "list", "bias"],
)
def test_a_weight_used_in_python_is_refused(base: nn.Module, use) -> None:
    class Functional(Halting):
        def forward(self, x: Tensor) -> Tensor:
            return use(self, x) if x.sum() > 0 else super().forward(x)

    model = vera_fx.adapt(Functional().eval(), CONFIG)
    with pytest.warns(vera_fx.PartialCaptureWarning):
        model(-X.abs())
    with pytest.raises(vera_fx.TargetError, match="'head' is adapted, .* exclude 'head'"):
        model(X.abs())
    with vera_fx.disable_adapters(model):
        model(X.abs())


def test_harmless_uses_of_a_weight() -> None:
    class Careful(Halting):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.head.weight
            x = x.to(weight.dtype).to(weight.device)[:, : weight.shape[1]]
            return super().forward(x) * (weight.size(0) > 2) if x.sum() else x

    model = vera_fx.adapt(Careful().eval(), CONFIG)
    with pytest.warns(vera_fx.PartialCaptureWarning):
        assert model(X).shape == (4, 5)


def test_attention_keeps_its_projection_adapted() -> None:
    """Called functionally inside MultiheadAttention, which is a part with a graph of its own."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x, x, x, need_weights=False)[0]
            return y if y.sum() > 0 else -y

    torch.manual_seed(0)
    model = vera_fx.adapt(Attending().eval(), vera_fx.VeraConfig(r=3, target_modules=["out_proj"]))
    fill_vectors(model)
    x = torch.randn(2, 5, 6)
    with pytest.warns(vera_fx.PartialCaptureWarning):
        found = model(x)
    with torch.no_grad():
        assert_close(found.detach(), vera_fx.unload(copy.deepcopy(model), merge=True)(x), factor=20)
        assert_far_apart(found.detach(), vera_fx.unload(copy.deepcopy(model))(x))


def test_arguments_that_no_graph_can_take() -> None:
    class Thing:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Taking(Halting):
        def forward(self, thing: Thing) -> Tensor:
            return self.head(self.blocks[0](thing.x))

    torch.manual_seed(0)
    base = Taking().eval()
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)
    with pytest.warns(vera_fx.PartialCaptureWarning, match="argument 'thing' holds a Thing"):
        found = model(Thing(X))
    assert_close(found, hook_reference(base, model)(Thing(X)))
    with pytest.raises(vera_fx.CaptureError, match="adapter_names needs the call as one graph"):
        model(Thing(X), adapter_names=["default"])


def test_parts_of_parts() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = Halting(), Block(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x))

    torch.manual_seed(0)
    base = Outer().eval()
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)
    with pytest.warns(vera_fx.PartialCaptureWarning) as found:
        first = model(X)
    assert [str(w.message).partition(" cannot")[0] for w in found] == ["Outer", "'inner' in Outer"]
    assert_close(first, hook_reference(base, model)(X))
    assert [path for path, _ in vera_fx.explain(model).python] == ["", "inner"]
