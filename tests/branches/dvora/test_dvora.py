"""DVoRA, the second kind of branch: against its ten lines, and against PEFT's LoRA with DoRA."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import vera_fx
from tests.helpers import assert_close, assert_far_apart, loss_of
from tests.models import MLP, Attention, llama, text_inputs
from vera_fx.branches.dvora.reference import dvora_linear

PLANS = ("factored", "dense")
X = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))


def config(plan: str = "auto", **fields: Any) -> vera_fx.DVoraConfig:
    return vera_fx.DVoraConfig(
        **{"r": 4, "target_modules": ["lin0", "lin1"], "plan": plan, **fields}
    )


def fill(model: nn.Module) -> nn.Module:
    """Values that are neither zero nor the base's own norms."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(model.vera.named_parameters()):
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.copy_(p * (1 + 0.3 * noise.tanh()) if "magnitude" in name else 0.4 * noise)
    return model


def adapted(plan: str = "auto", **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return fill(vera_fx.adapt(MLP().eval(), config(plan, **fields)))


def own(model: nn.Module, path: str, name: str = "default") -> tuple[tuple[Tensor, ...], Tensor]:
    """A, B, d, b and m of a target."""
    adapter = model.vera.adapter(name)
    pair, vectors = model.vera.projections_of(adapter), adapter.vectors_at(path)
    vera = (pair.vera_A, pair.vera_B, vectors.vera_lambda_d, vectors.vera_lambda_b)
    return vera, vectors.vera_magnitude_vector


def by_reference(model: nn.Module, x: Tensor) -> Tensor:
    """The MLP with `dvora_linear` in the place of its layers."""
    for path in ("lin0", "lin1"):
        layer = model.get_submodule(path)
        x = dvora_linear(x, layer.weight, layer.bias, *own(model, path))
        x = torch.tanh(x) if path == "lin0" else x
    return x


def vectors(model: nn.Module) -> list[Tensor]:
    return list(model.vera.adapters.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_outputs_and_gradients_are_the_references(plan: str, compiled: bool) -> None:
    model = adapted(plan)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model

    found, expected = call(X), by_reference(model, X)
    assert_close(found, expected, factor=5)
    assert_far_apart(
        found, torch.tanh(X @ model.lin0.weight.T + model.lin0.bias) @ model.lin1.weight.T
    )
    gradients = torch.autograd.grad(loss_of(found), vectors(model))
    wanted = torch.autograd.grad(loss_of(expected), vectors(model))
    for actual, value in zip(gradients, wanted, strict=True):
        assert_close(actual, value, factor=20)
    with torch.no_grad():
        assert_close(call(X), expected.detach(), factor=5)


@pytest.mark.parametrize("plan", PLANS)
def test_three_steps_end_where_the_references_do(plan: str) -> None:
    model = adapted(plan)
    twin = copy.deepcopy(model)
    for stepped, forward in ((model, model), (twin, lambda x: by_reference(twin, x))):
        optimizer = torch.optim.AdamW(vectors(stepped), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(forward(X[step:])).backward()
            optimizer.step()
    for actual, expected in zip(vectors(model), vectors(twin), strict=True):
        assert_close(actual.detach(), expected.detach(), factor=50)


@given(
    rank=st.integers(1, 9),
    lead=st.lists(st.sampled_from((0, 1, 2, 5)), max_size=3),
    plan=st.sampled_from(("auto", *PLANS)),
    grad=st.booleans(),
)
def test_any_rank_and_shape(rank: int, lead: list[int], plan: str, grad: bool) -> None:
    model = adapted(plan, r=rank).double()
    x = torch.randn(*lead, 10, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        assert_close(model(x).detach(), by_reference(model, x).detach(), factor=10)


def test_it_starts_at_the_base_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        base = MLP().eval().to(dtype)
        model = vera_fx.adapt(copy.deepcopy(base), config("factored"))
        assert torch.equal(model(X.to(dtype)), base(X.to(dtype)))


@pytest.mark.parametrize("plan", PLANS)
def test_conv1d_and_shared_inputs(plan: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lin = Conv1D(7, 10), nn.Linear(10, 7, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.lin(x)

    torch.manual_seed(0)
    fields = {"r": 3, "target_modules": ["conv", "lin"], "plan": plan}
    model = fill(vera_fx.adapt(Net(), vera_fx.DVoraConfig(**fields)))
    conv = dvora_linear(X, model.conv.weight.T, model.conv.bias, *own(model, "conv"))
    lin = dvora_linear(X, model.lin.weight, None, *own(model, "lin"))
    assert_close(model(X), conv * lin, factor=10)


def test_it_is_pefts_lora_with_dora(tmp_path: Path) -> None:
    model = adapted()
    vera_fx.to_lora(model, tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(MLP().eval(), tmp_path)

    assert theirs.peft_config["default"].use_dora
    assert_close(model(X).detach(), theirs(X).detach(), factor=5)


def test_dropout_is_pefts(tmp_path: Path) -> None:
    model = adapted(vera_dropout=0.5)
    vera_fx.to_lora(model, tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(MLP(), tmp_path, is_trainable=True)
    model.drop.p = theirs.base_model.model.drop.p = 0.0
    outputs = []
    for trained in (model, theirs):
        torch.manual_seed(5)
        outputs.append(trained.train()(X).detach())

    assert_close(*outputs, factor=5)
    assert_far_apart(outputs[0], model.eval()(X).detach())


class TestFiles:
    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model = adapted()
        vera_fx.save_adapter(model, tmp_path)
        torch.manual_seed(0)
        fresh = vera_fx.load_adapter(MLP(), tmp_path)

        assert torch.equal(fresh(X), model(X).detach())
        assert type(fresh.vera.adapter("default").config) is vera_fx.DVoraConfig
        assert "not with PEFT" in (tmp_path / "README.md").read_text()
        state = vera_fx.adapter_state_dict(model)
        assert "base_model.model.lin0.vera_magnitude_vector" in state
        vera_fx.load_adapter_state_dict(fresh, {k: v * 1 for k, v in state.items()})

    def test_without_projections(self, tmp_path: Path) -> None:
        model = adapted(save_projection=False)
        vera_fx.save_adapter(model, tmp_path)
        torch.manual_seed(0)

        assert_close(vera_fx.load_adapter(MLP(), tmp_path)(X), model(X).detach())

    def test_a_lost_magnitude_is_an_error(self, tmp_path: Path) -> None:
        model = adapted()
        state = vera_fx.adapter_state_dict(model)
        del state["base_model.model.lin1.vera_magnitude_vector"]
        with pytest.raises(vera_fx.CheckpointError, match="lin1.vera_magnitude_vector"):
            vera_fx.load_adapter_state_dict(model, state)


class TestMerging:
    def test_merged_and_back(self) -> None:
        model = adapted()
        weight, expected = model.lin0.weight.clone(), model(X).detach()
        vera_fx.merge(model)
        assert_close(model(X).detach(), expected, factor=5)
        vera_fx.unmerge(model)
        assert torch.equal(model.lin0.weight, weight)
        assert torch.equal(model(X).detach(), expected)

    def test_for_good(self) -> None:
        model = adapted()
        expected = model(X).detach()
        base = vera_fx.unload(model, merge=True)
        assert type(base) is MLP
        assert_close(base(X).detach(), expected, factor=5)

    def test_never_beside_others(self) -> None:
        model = adapted()
        vera_fx.add_adapter(model, "vera", vera_fx.VeraConfig(r=3, target_modules=["lin0"]))
        vera_fx.set_adapter(model, ["default", "vera"])
        weight = model.lin0.weight.clone()
        with pytest.raises(vera_fx.AdapterError, match="'default' cannot be merged beside 'vera'"):
            vera_fx.merge(model)
        assert torch.equal(model.lin0.weight, weight)


class TestBesideOthers:
    def test_kinds_switch_and_add_up(self) -> None:
        model = adapted("factored")
        vera_fx.add_adapter(model, "vera", vera_fx.VeraConfig(r=3, target_modules=["lin0"]))
        vera_fx.add_adapter(model, "part", config("factored", target_modules=["lin1"], r=2))
        fill(model)
        alone = {}
        for name in ("default", "vera", "part"):
            vera_fx.set_adapter(model, name)
            alone[name] = model.lin1(X @ torch.ones(10, 20)).detach()
        assert_close(
            alone["vera"], F.linear(X @ torch.ones(10, 20), model.lin1.weight, model.lin1.bias)
        )
        vera_fx.set_adapter(model, ["vera", "part"])
        sums = alone["vera"] + alone["part"] - alone["vera"]
        assert_close(model.lin1(X @ torch.ones(10, 20)).detach(), sums, factor=5)
        both = model(X).detach()
        vera_fx.set_adapter(model, "part")
        assert_far_apart(model(X).detach(), both)
        with vera_fx.disable_adapters(model):
            torch.manual_seed(0)
            assert torch.equal(model(X), MLP().eval()(X))

    def test_a_target_it_lacks_stays_the_base(self) -> None:
        model = adapted("factored", target_modules=["lin0"])
        vera_fx.add_adapter(model, "wide", config("factored"))
        x = dvora_linear(X, model.lin0.weight, model.lin0.bias, *own(model, "lin0"))
        expected = F.linear(torch.tanh(x), model.lin1.weight, model.lin1.bias)

        assert_close(model(X), expected, factor=5)

    def test_mixtures_are_refused_by_name(self) -> None:
        model = adapted()
        with pytest.raises(
            vera_fx.AdapterError, match=r"\[1\] is 'default', a DVoRA adapter: its magnitude"
        ):
            model(X[:2], adapter_names=["__base__", "default"])
        vera_fx.add_adapter(model, "vera", vera_fx.VeraConfig(r=3, target_modules=["lin0"]))
        fill(model)
        mixed = model(X[:2], adapter_names=["__base__", "vera"])
        vera_fx.set_adapter(model, "vera")
        assert_close(mixed[1], model(X[1:2])[0].detach(), factor=5)

    def test_plans_it_lacks_are_refused(self) -> None:
        with pytest.raises(
            vera_fx.ConfigError, match="plan must be one of .*'dense', got 'scaled'"
        ):
            config("scaled")


def test_programs_hold_it(tmp_path: Path) -> None:
    model = adapted()
    expected = model(X).detach()
    for form in ("merged", "constant", "input"):
        program = vera_fx.export_program(model, (X,), form=form)
        path = vera_fx.save_program(program, tmp_path / f"{form}.pt2")
        arguments = (
            {"vectors": vera_fx.program_vectors(model, None, program)} if form == "input" else {}
        )
        assert_close(vera_fx.load_program(path).module()(X, **arguments), expected, factor=5)


def test_a_whole_model_trains_and_generates() -> None:
    torch.manual_seed(0)
    model = llama().train()
    vera_fx.adapt(model, vera_fx.DVoraConfig(r=8, target_modules="all-linear", d_initial=0.5))
    fill(model)
    optimizer = torch.optim.AdamW(vectors(model), lr=1e-2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = compiled(**text_inputs()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    unmerged = model.generate(**text_inputs(labels=False), max_new_tokens=4, do_sample=False)
    vera_fx.merge(model)
    assert torch.equal(
        unmerged, model.generate(**text_inputs(labels=False), max_new_tokens=4, do_sample=False)
    )


def test_attention_output_and_picture() -> None:
    torch.manual_seed(0)
    model = vera_fx.adapt(Attention(), vera_fx.DVoraConfig(r=3, target_modules=["query", "value"]))
    model(torch.randn(2, 5, 12))
    text = vera_fx.explain(model)

    assert "dense" in str(text)
    assert "V/|V|" in text.html()
    assert text.graphs[0].kinds == ("DVoRA",)
