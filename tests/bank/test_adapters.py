"""Several adapters: add, switch, sum, disable, delete, merge; the base always comes back."""

import copy

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, assert_far_apart, hook_reference, main_output, vectors_of
from tests.models import BY_NAME, MLP

X = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))
CONFIGS = {
    "default": vera_fx.VeraConfig(r=5, target_modules=["lin0", "lin1"]),
    "smaller": vera_fx.VeraConfig(r=2, target_modules=["lin0", "lin1"]),
    "partial": vera_fx.VeraConfig(r=3, target_modules=["lin0"], projection_prng_key=4),
    "wider": vera_fx.VeraConfig(r=7, target_modules=["lin1"]),
}


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for index, p in enumerate(model.vera.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index + 1)) * 0.5)


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


@pytest.fixture
def model(base: nn.Module) -> nn.Module:
    model = vera_fx.adapt(copy.deepcopy(base), CONFIGS["partial"], adapter_name="partial")
    for name in ("default", "smaller", "wider"):
        vera_fx.add_adapter(model, name, CONFIGS[name])
    randomise(model)
    return model


def alone(base: nn.Module, model: nn.Module, names: tuple[str, ...]) -> Tensor:
    """What the named adapters give together, by the hook oracle."""
    before = vera_fx.active_adapters(model)
    vera_fx.set_adapter(model, names)
    expected = hook_reference(base, model)(X)
    vera_fx.set_adapter(model, before)
    return expected


@pytest.mark.parametrize("name", CONFIGS)
def test_each_adapter_computes_with_its_own_projections(
    base: nn.Module, model: nn.Module, name: str
) -> None:
    expected = alone(base, model, (name,))
    vera_fx.set_adapter(model, name)

    assert_close(model(X), expected)
    assert_far_apart(expected, base(X))


def test_several_active_adapters_add_up(base: nn.Module, model: nn.Module) -> None:
    names = ("default", "partial", "wider")
    expected = alone(base, model, names)
    vera_fx.set_adapter(model, names)

    assert_close(model(X), expected)
    assert vera_fx.active_adapters(model) == list(names)


def test_switching_never_captures_again(model: nn.Module) -> None:
    model(X)
    for name in [*CONFIGS, *reversed(CONFIGS)]:
        vera_fx.set_adapter(model, name)
        model(X)

    assert len(vera_fx.explain(model).graphs) == 1


def test_only_active_adapters_train(model: nn.Module) -> None:
    vera_fx.set_adapter(model, "wider")
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"wider"}
    model(X).square().sum().backward()
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.grad is not None} == {"wider"}


def test_disable_is_the_base_and_nests(base: nn.Module, model: nn.Module) -> None:
    expected = model(X)
    with vera_fx.disable_adapters(model):
        assert vera_fx.active_adapters(model) == []
        with vera_fx.disable_adapters(model):
            assert torch.equal(model(X), base(X))
        assert torch.equal(model(X), base(X))
    assert torch.equal(model(X), expected)


def test_disable_comes_back_after_an_error(model: nn.Module) -> None:
    expected = model(X)
    with pytest.raises(RuntimeError, match="inside"), vera_fx.disable_adapters(model):
        raise RuntimeError("inside")
    assert torch.equal(model(X), expected)


def test_delete_then_add(base: nn.Module, model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="No adapter is active now.*'default', 'smaller', 'wider'"):
        vera_fx.delete_adapter(model, "partial")
    for name in ("default", "smaller", "wider"):
        vera_fx.delete_adapter(model, name)
    assert vera_fx.adapter_names(model) == []
    assert torch.equal(model(X), base(X))
    with pytest.raises(vera_fx.AdapterError, match="give one"):
        vera_fx.add_adapter(model, "new")
    vera_fx.add_adapter(model, "new", CONFIGS["default"])
    vera_fx.set_adapter(model, "new")
    randomise(model)

    assert_close(model(X), alone(base, model, ("new",)))


def test_unknown_names(model: nn.Module) -> None:
    for function in (
        vera_fx.set_adapter,
        vera_fx.delete_adapter,
        vera_fx.merge,
        vera_fx.adapter_state_dict,
    ):
        with pytest.raises(vera_fx.AdapterError, match="called 'smallest'; did you mean 'smaller'"):
            function(model, "smallest")


@pytest.mark.parametrize("keep", [True, False])
def test_merge_and_unmerge(base: nn.Module, model: nn.Module, keep: bool) -> None:
    vera_fx.set_adapter(model, "default")
    expected, weight = model(X), base.lin0.weight.clone()
    vera_fx.merge(model, keep_base=keep)
    assert_close(model(X), expected, factor=5)
    assert not torch.equal(model.lin0.weight, weight)
    vera_fx.unmerge(model)

    assert torch.equal(model(X), expected) if keep else True
    assert (
        torch.equal(model.lin0.weight, weight)
        if keep
        else torch.allclose(model.lin0.weight, weight, atol=1e-6)
    )


def test_merging_one_of_two_keeps_the_other(base: nn.Module, model: nn.Module) -> None:
    vera_fx.set_adapter(model, ["default", "wider"])
    expected = model(X)
    vera_fx.merge(model, "default")

    assert_close(model(X), expected, factor=5)
    with pytest.warns(UserWarning, match="already merged"):
        vera_fx.merge(model, "default")
    with vera_fx.disable_adapters(model):
        assert_close(model(X), base(X), factor=5)
    assert_close(model(X), expected, factor=5)
    with pytest.raises(vera_fx.AdapterError, match="is merged into the base"):
        vera_fx.delete_adapter(model, "default")


def test_setting_while_merged_unmerges(base: nn.Module, model: nn.Module) -> None:
    vera_fx.merge(model, "partial", keep_base=True)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        vera_fx.set_adapter(model, "wider")
    assert torch.equal(model.lin0.weight, base.lin0.weight)
    assert_close(model(X), alone(base, model, ("wider",)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_broken_adapters(model: nn.Module, value: float) -> None:
    before = model.lin0.weight.clone()
    with torch.no_grad():
        model.vera.adapters["partial"].vectors_at("lin0").vera_lambda_b[0] = value
    with pytest.raises(vera_fx.AdapterError, match="NaN or infinity"):
        vera_fx.merge(model, "partial")
    assert torch.equal(model.lin0.weight, before)
    vera_fx.merge(model, "partial", safe=False)
    assert not torch.isfinite(model.lin0.weight).all()


def test_unload(base: nn.Module, model: nn.Module) -> None:
    vera_fx.set_adapter(model, "default")
    expected = model(X)
    merged = vera_fx.unload(copy.deepcopy(model), merge=True)
    plain = vera_fx.unload(model)

    assert type(merged) is type(plain) is MLP
    assert_close(merged(X), expected, factor=5)
    assert torch.equal(plain(X), base(X))
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert not any(m._forward_hooks for m in plain.modules())
    assert all(p.requires_grad for p in plain.parameters())


def test_merging_a_conv1d() -> None:
    family = BY_NAME["gpt2"]
    torch.manual_seed(0)
    model = vera_fx.adapt(family.build().eval(), vera_fx.VeraConfig(r=6, **family.config))
    randomise(model)
    inputs = family.inputs()
    expected = main_output(model(**inputs))
    vera_fx.merge(model)

    assert_close(main_output(model(**inputs)), expected, factor=20)


def test_merging_a_tied_weight_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model = vera_fx.adapt(Tied(), vera_fx.VeraConfig(r=2, target_modules=["head"]))
    with pytest.raises(vera_fx.AdapterError, match="'head' is tied to 'embed.weight'"):
        vera_fx.merge(model)


class TestTrainedCopies:
    """``modules_to_save`` and biases: each adapter its own, the base untouched."""

    @pytest.fixture
    def head_model(self) -> nn.Module:
        torch.manual_seed(0)
        config = vera_fx.VeraConfig(
            r=4, target_modules=["lin0"], modules_to_save=["lin1"], bias="vera_only"
        )
        model = vera_fx.adapt(MLP().eval(), config)
        vera_fx.add_adapter(model, "other")
        return model

    def train(self, model: nn.Module) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model(X).square().sum().backward()
        optimizer.step()

    def test_copies_train_and_switch(self, head_model: nn.Module) -> None:
        plain = copy.deepcopy(head_model.lin1.weight), copy.deepcopy(head_model.lin0.bias)
        start = head_model(X)
        self.train(head_model)
        trained = head_model(X)
        vera_fx.set_adapter(head_model, "other")

        assert not torch.equal(trained, start)
        assert torch.equal(head_model(X), start)
        assert torch.equal(head_model.lin1.weight, plain[0])
        assert torch.equal(head_model.lin0.bias, plain[1])
        vera_fx.set_adapter(head_model, "default")
        assert torch.equal(head_model(X), trained)
        with vera_fx.disable_adapters(head_model):
            assert torch.equal(head_model(X), start)

    def test_two_copies_of_one_module_cannot_be_active(self, head_model: nn.Module) -> None:
        with pytest.raises(vera_fx.AdapterError, match="its own trained copy of 'lin1'"):
            vera_fx.set_adapter(head_model, ["default", "other"])
        assert vera_fx.active_adapters(head_model) == ["default"]

    def test_direct_calls_use_the_copies(self, head_model: nn.Module) -> None:
        self.train(head_model)
        expected = head_model(X)
        assert_close(head_model.lin1(torch.tanh(head_model.lin0(X))), expected)

    def test_merge_carries_them(self, head_model: nn.Module) -> None:
        self.train(head_model)
        expected = head_model(X)
        merged = vera_fx.unload(copy.deepcopy(head_model), merge=True)
        assert_close(merged(X), expected, factor=5)
        vera_fx.merge(head_model, keep_base=True)
        assert_close(head_model(X), expected, factor=5)
        vera_fx.unmerge(head_model)
        assert torch.equal(head_model(X), expected)


def test_summary_reads_like_pefts(model: nn.Module) -> None:
    vera_fx.set_adapter(model, "partial")
    trainable = sum(p.numel() for p in vectors_of(model).values() if p.requires_grad)

    assert trainable == 23
    assert str(vera_fx.parameter_summary(model)).startswith("trainable params: 23 || all params: ")
