"""No stale graph: whatever changes about the model or the call leads to the right graph."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, fill_vectors, hook_reference, main_output
from tests.models import BY_NAME, MLP, Attention

CONFIG = vera_fx.VeraConfig(r=3, target_modules=["lin0", "lin1"], plan="factored")
X = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))


def adapted(base: nn.Module, config: vera_fx.VeraConfig = CONFIG) -> nn.Module:
    model = vera_fx.adapt(base, config)
    fill_vectors(model)
    return model


def graphs(model: nn.Module) -> int:
    return len(vera_fx.explain(model).graphs)


def oracle(model: nn.Module, *args, **kwargs):
    """The model as it is now, run eagerly with hooks instead of graphs."""
    return hook_reference(vera_fx.unload(copy.deepcopy(model)), model)(*args, **kwargs)


class TestSignatures:
    def test_positional_and_keyword_calls_are_one_signature(self) -> None:
        model = adapted(Attention(), vera_fx.VeraConfig(r=3, target_modules=["query", "out"]))
        x, mask = torch.randn(2, 5, 12), torch.zeros(5, 5)
        results = [
            model(x, mask),
            model(x=x, mask=mask),
            model(x, mask=mask),
            model(mask=mask, x=x),
        ]

        assert all(torch.equal(r[0], results[0][0]) for r in results)
        # The order of keywords does not matter, but it is part of the key.
        assert graphs(model) <= 2

    def test_none_is_the_default(self) -> None:
        model = adapted(Attention(), vera_fx.VeraConfig(r=3, target_modules=["query"]))
        x = torch.randn(2, 5, 12)
        assert torch.equal(model(x)[0], model(x, None)[0])
        assert graphs(model) == 1

    def test_sizes_share_a_graph_but_for_one_and_zero(self) -> None:
        model = adapted(MLP().eval())
        for size in (2, 3, 17):
            assert_close(model(torch.ones(size, 10)), oracle(model, torch.ones(size, 10)))
        assert graphs(model) == 1
        for size in (1, 0, 1):
            assert_close(model(torch.ones(size, 10)), oracle(model, torch.ones(size, 10)))
        assert graphs(model) == 3

    def test_constants_are_part_of_the_signature(self) -> None:
        class Power(MLP):
            def forward(self, x: Tensor, power: float = 1, *, flag: bool = False) -> Tensor:
                y = super().forward(x) * power
                return -y if flag else y

        model = adapted(Power().eval())
        y = model(X)
        assert torch.equal(model(X, 2), 2 * y)
        assert torch.equal(model(X, 2, flag=True), -2 * y)
        assert torch.equal(model(X, True), y)  # True == 1, yet another constant
        assert graphs(model) == 4

    def test_nested_arguments_and_results(self) -> None:
        class Nested(MLP):
            def forward(self, items: dict, *rest: Tensor, scale: list[float] = (1.0,)) -> dict:
                y = super().forward(items["x"]) * scale[0]
                return {"y": y, "more": [items["pair"][0] + 1, (rest[0] if rest else None)], "n": 3}

        model = adapted(Nested().eval())
        pair = (torch.ones(2), None)
        result = model({"x": X, "pair": pair}, torch.zeros(3), scale=[2.0])
        expected = oracle(model, {"x": X, "pair": pair}, torch.zeros(3), scale=[2.0])

        assert result.keys() == expected.keys()
        assert torch.equal(result["y"], expected["y"])
        assert torch.equal(result["more"][0], expected["more"][0])
        assert torch.equal(result["more"][1], torch.zeros(3))
        assert result["n"] == 3
        assert model({"x": X, "pair": pair})["more"][1] is None

    def test_strided_inputs(self) -> None:
        model = adapted(MLP().eval())
        wide = torch.randn(10, 4)
        assert torch.equal(model(wide.T), model(wide.T.contiguous()))

    @pytest.mark.parametrize(
        ("size_of", "most"), [(len, 5), (lambda y: y.shape[0], 2)], ids=["len", "shape"]
    )
    def test_sizes_a_graph_does_not_admit_are_captured_again(self, size_of, most: int) -> None:
        """`len` fixes the size in the trace, `shape` bounds it; either way no graph runs out of bounds."""

        class Halves(MLP):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                return y[: size_of(y) // 2] if size_of(y) > 6 else y * 2

        model = adapted(Halves().eval())
        for size in (4, 9, 5, 8, 3, 9, 4):
            x = torch.randn(size, 10)
            assert_close(model(x), oracle(model, x), what=str(size))
        assert graphs(model) == most

    def test_related_sizes(self) -> None:
        class Joined(MLP):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                rows = x if x.shape[0] == y.shape[0] else x[:1]
                return super().forward(rows) + y.sum()

        model = adapted(Joined().eval())
        for first, second in ((4, 4), (4, 3), (5, 5), (5, 6)):
            x, y = torch.randn(first, 10), torch.randn(second, 2)
            assert_close(model(x, y), oracle(model, x, y), what=f"{first}, {second}")
        assert graphs(model) == 2


class TestState:
    def test_train_and_eval(self) -> None:
        model = adapted(MLP())
        model.train()
        torch.manual_seed(1)
        first = model(X)
        torch.manual_seed(1)
        assert torch.equal(oracle(model, X), first)
        model.eval()
        assert torch.equal(model(X), oracle(model, X))
        assert not torch.equal(model(X), first)
        model.train()
        torch.manual_seed(1)
        assert torch.equal(model(X), first)
        assert graphs(model) == 2

    def test_one_submodule_in_another_mode(self) -> None:
        model = adapted(MLP())
        model.train()
        model(X)
        model.drop.eval()
        assert torch.equal(model(X), oracle(model, X))
        assert vera_fx.explain(model).graphs[1].mode == "mixed"

    def test_dropout_rate(self) -> None:
        model = adapted(MLP())
        model(X)
        model.drop.p = 0.0
        assert torch.equal(model(X), oracle(model, X))

    def test_flag_of_the_configuration(self) -> None:
        family = BY_NAME["bert"]
        model = adapted(family.build().eval(), vera_fx.VeraConfig(r=3))
        inputs = family.inputs()
        assert model(**inputs).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(**inputs).hidden_states) == 3
        model.config.output_hidden_states = False
        assert model(**inputs).hidden_states is None
        assert isinstance(model(**inputs, return_dict=False), tuple)

    def test_attention_implementation(self) -> None:
        family = BY_NAME["llama"]
        model = adapted(family.build().eval(), vera_fx.VeraConfig(r=3))
        inputs = {"input_ids": family.inputs()["input_ids"]}  # masked rows differ by implementation
        first = model(**inputs).logits
        model.set_attn_implementation("eager")
        second = model(**inputs, output_attentions=True)

        assert second.attentions is not None
        assert_close(second.logits, first, factor=10)

    def test_batch_norm_statistics_keep_updating(self) -> None:
        class Normed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(10, 6)
                self.norm = nn.BatchNorm1d(6)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(self.lin(x))

        base = Normed()
        model = adapted(copy.deepcopy(base), vera_fx.VeraConfig(r=3, target_modules=["lin"]))
        reference = hook_reference(base, model)
        for _ in range(3):
            assert_close(model(X), reference(X))
        assert model.norm.num_batches_tracked == 3
        assert_close(model.norm.running_mean, reference.norm.running_mean)
        assert_close(model.norm.running_var, reference.norm.running_var)


class TestParameters:
    def test_base_weights_are_read_live(self) -> None:
        model = adapted(MLP().eval())
        model(X)
        with torch.no_grad():
            model.lin0.weight.mul_(2)
        assert torch.equal(model(X), oracle(model, X))
        model.lin1.weight = nn.Parameter(torch.randn(7, 20), requires_grad=False)
        assert torch.equal(model(X), oracle(model, X))
        assert graphs(model) == 1

    @pytest.mark.parametrize("assign", [True, False])
    def test_load_state_dict(self, assign: bool) -> None:
        model, other = adapted(MLP().eval()), adapted(MLP().eval())
        with torch.no_grad():
            for p in other.vera.parameters():
                p.mul_(-3)
        model(X)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(model(X), other(X))

    def test_to_another_dtype(self) -> None:
        model = adapted(MLP().eval())
        first = model(X)
        model.double()
        assert_close(model(X.double()).float(), first, factor=10)
        model.float()
        assert_close(model(X), first, factor=10)

    def test_deepcopy_is_independent(self) -> None:
        model = adapted(MLP().eval())
        expected = model(X)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(X), expected)
        with torch.no_grad():
            for p in twin.vera.parameters():
                p.zero_()
        assert torch.equal(model(X), expected)
        assert not torch.equal(twin(X), expected)
        assert torch.equal(twin.lin1(torch.tanh(twin.lin0(X))), twin(X))  # its hooks are its own

    def test_pickle(self) -> None:
        model = adapted(MLP().eval())
        expected = model(X)
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(X), expected)
        assert vera_fx.adapter_names(twin) == ["default"]

    def test_requires_grad_of_the_base_is_obeyed(self) -> None:
        model = adapted(MLP().eval())
        model(X)
        model.lin0.weight.requires_grad_(requires_grad=True)
        model(X).sum().backward()
        assert model.lin0.weight.grad.abs().sum() > 0


def test_inputs_get_gradients() -> None:
    model = adapted(MLP().eval())
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    (expected,) = torch.autograd.grad(oracle(model, x).square().sum(), x)
    assert_close(grad, expected, factor=5)


def test_no_grad_and_inference_mode() -> None:
    model = adapted(MLP().eval())
    with torch.inference_mode():
        first = model(X)
    with torch.no_grad():
        second = model(X)
    assert torch.equal(first, second)
    assert torch.equal(model(X), second)
    assert model(X).requires_grad
    assert graphs(model) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = adapted(MLP().eval())
    first = model(X)
    with torch.autocast("cpu", dtype=dtype):
        half = model(X)
        expected = oracle(model, X)
    assert half.dtype == expected.dtype
    assert_close(half, expected)
    assert torch.equal(model(X), first)


def test_capture_leaves_no_trace() -> None:
    model = adapted(MLP())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    vera_fx.capture(model, X)
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in model.parameters())
    assert graphs(model) == 1


def test_first_calls_from_many_threads() -> None:
    model = adapted(MLP().eval())
    expected = oracle(model, X)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(model(X))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(results) == 6
    assert all(torch.allclose(r, expected, atol=1e-6) for r in results)
    assert graphs(model) == 1


def test_transformer_encoder_and_attention_layers() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True, dropout=0.1)
    base = nn.TransformerEncoder(layer, 2).eval()
    model = adapted(
        copy.deepcopy(base),
        vera_fx.VeraConfig(r=3, target_modules=["linear1", "linear2", "out_proj"]),
    )
    x = torch.randn(2, 5, 12)
    result = model(x)

    (graph,) = vera_fx.explain(model).graphs
    assert len(graph.sites) == 6
    with torch.no_grad():  # by the definition: fold the branches into a plain copy's weights
        folded = vera_fx.unload(copy.deepcopy(model), merge=True)
        expected = folded(x)
    assert_close(result.detach(), expected, factor=10)
    assert not torch.allclose(result, base(x))


def test_dropout_of_the_branch_is_pefts() -> None:
    import peft

    torch.manual_seed(0)
    base = MLP()
    fields = {
        "r": 4,
        "target_modules": ["lin0", "lin1"],
        "vera_dropout": 0.4,
    }  # leaves only the factored plan
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**fields))
    ours = adapted(copy.deepcopy(base), vera_fx.VeraConfig(**fields, plan="factored"))
    fill_vectors(theirs)
    for mode in (True, False):
        theirs.train(mode), ours.train(mode)
        torch.manual_seed(2)
        expected = theirs(X)
        torch.manual_seed(2)
        assert torch.equal(ours(X), expected)
    assert torch.equal(ours(X), ours(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_equals_peft(dtype: torch.dtype) -> None:
    import peft

    family = BY_NAME["llama"]
    torch.manual_seed(0)
    base = family.build().to(dtype).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=6)).eval()
    ours = adapted(copy.deepcopy(base), vera_fx.VeraConfig(r=6, plan="factored")).eval()
    fill_vectors(theirs)
    expected = main_output(theirs(**family.inputs()))

    assert torch.equal(main_output(ours(**family.inputs())), expected)
    assert torch.equal(ours.vera.slot0.vera_A, theirs.base_model.vera_A["default"])
    assert {p.dtype for p in ours.vera.parameters()} == {torch.float32}
    low = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(r=6), autocast_adapter_dtype=False)
    assert {p.dtype for p in low.vera.parameters()} == {dtype}
    assert main_output(low(**family.inputs())).dtype == dtype
