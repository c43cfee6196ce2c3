"""Deep models: torch.compile compiles each kind of layer once, whatever their number."""

import copy
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import vera_fx
from tests.helpers import (
    assert_close,
    assert_same_gradients,
    fill_vectors,
    gradients,
    kept_tensors,
    vectors_of,
)
from tests.models import llama, text_inputs

LAYERS = 5


@pytest.fixture(autouse=True)
def _whatever_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as these would stay flat."""
    monkeypatch.setenv("VERA_FX_OUTLINE", "4")


def deep_llama() -> nn.Module:
    torch.manual_seed(0)
    return llama(LAYERS)


@pytest.fixture
def model() -> nn.Module:
    config = vera_fx.VeraConfig(r=6, target_modules="all-linear")
    model = vera_fx.adapt(deep_llama(), config)
    fill_vectors(model)
    return model


def deep_bert(**fields: object) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    base = BertModel(config, add_pooling_layer=False)
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=6, **fields))
    fill_vectors(model)
    return model


def inputs(batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    return {name: value[:batch, :length].clone() for name, value in text_inputs().items()}


def bodies(model: nn.Module) -> list[str]:
    """The bodies that the newest graph calls in turn."""
    report = vera_fx.explain(model).graphs[-1].report
    record = next(r for r in report.records if r.name == "OutlineLayers")
    return [rewrite.other for rewrite in record.report.rewrites]


def test_values_and_gradients_are_those_of_the_flat_graph(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = copy.deepcopy(model)
    found, loss = gradients(model, lambda m: m(**inputs())), model(**inputs()).loss
    assert bodies(model) == ["_body_0", *["_body_1"] * LAYERS, "_body_2"]

    monkeypatch.setenv("VERA_FX_OUTLINE", "0")
    expected = gradients(flat, lambda m: m(**inputs()))
    assert bodies(flat) == []
    assert torch.equal(flat(**inputs()).loss, loss)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def kept_by(model: nn.Module, x: Tensor) -> int:
    """Elements of what a compiled step keeps for every token, statistics of norms left out."""
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    kept = kept_tensors(lambda: compiled(inputs_embeds=x).last_hidden_state.square().sum())
    return sum(t.numel() for t in kept if t.numel() % x.numel() == 0)


def test_layers_begin_at_what_is_kept(monkeypatch: pytest.MonkeyPatch, fresh_dynamo) -> None:
    """Layers that end in a norm: its result is the next layer's input, and is computed again."""
    model = deep_bert(target_modules=["query", "value"], plan="dense")
    flat = copy.deepcopy(model)
    x = torch.randn(5, 11, 32, requires_grad=True)
    found = gradients(model, lambda m: m(inputs_embeds=x))
    assert bodies(model) == ["_body_0", *["_body_1"] * LAYERS, "_body_2"]
    kept = kept_by(model, x)

    monkeypatch.setenv("VERA_FX_OUTLINE", "0")
    expected = gradients(flat, lambda m: m(inputs_embeds=x))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert kept == kept_by(flat, x)


PARTS = {
    "linear": lambda: nn.Linear(8, 8),
    "norm": lambda: nn.LayerNorm(8),
    "activation": nn.SiLU,
    "idle dropout": lambda: nn.Dropout(0.0),
}


@settings(max_examples=10)
@given(
    parts=st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=4).map(
        lambda parts: ["linear", *parts]
    ),
    turn=st.integers(0, 4),
    nested=st.booleans(),
    plan=st.sampled_from(["dense", "merged"]),
)
def test_layers_of_any_order(parts: list[str], turn: int, nested: bool, plan: str) -> None:
    """Wherever norms and activations stand, outlined layers compute what the flat graph does."""
    torch.manual_seed(0)
    order = [*parts[turn:], *parts[:turn]]
    layers = [[PARTS[part]() for part in order] for _ in range(LAYERS)]
    body = [nn.Sequential(*layer) for layer in layers] if nested else list(chain(*layers))
    base = nn.Sequential(nn.LayerNorm(8), nn.Sequential(*body), nn.LayerNorm(8))
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=3, target_modules="all-linear", plan=plan))
    fill_vectors(model)
    flat, x = copy.deepcopy(model), torch.randn(3, 5, 8)
    found = gradients(model, lambda m: m(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERA_FX_OUTLINE", "0")
        expected = gradients(flat, lambda m: m(x))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_layers_are_compiled_once(model: nn.Module, fresh_dynamo) -> None:
    expected = gradients(model, lambda m: m(**inputs()))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    values = torch.autograd.grad(compiled(**inputs()).loss, list(vectors_of(model).values()))

    actual = dict(zip(expected, values, strict=True))
    assert_same_gradients(actual, expected)
    # Before the layers, a layer whose input needs no gradient, one whose input does, behind them.
    assert counter.frame_count == 4
    compiled(**inputs(2, 5)).loss.backward()
    assert counter.frame_count == 8  # now for any size
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, length in ((3, 7), (3, 6), (2, 4)):
            result = compiled(**inputs(batch, length))
            result.loss.backward()
            assert_close(result.logits, model(**inputs(batch, length)).logits, factor=10)
    assert not fresh_dynamo["graph_break"]


def test_adapters_switch_without_recompiling(model: nn.Module, fresh_dynamo) -> None:
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=6, target_modules="all-linear"))
    with torch.no_grad():
        for p in model.vera.adapters["other"].parameters():
            p.normal_()
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = compiled(**inputs()).logits
        with torch.compiler.set_stance("fail_on_recompile"):
            vera_fx.set_adapter(model, "other")
            second = compiled(**inputs()).logits
            assert_close(second, model(**inputs()).logits, factor=10)
            mixture = model(**inputs(), adapter_names=["default", "other", "__base__"]).logits

    assert not torch.equal(first, second)
    assert_close(mixture[0], first[0], factor=10)
    assert_close(mixture[1], second[1], factor=10)


def test_calls_without_gradients_keep_the_flat_graph(model: nn.Module, fresh_dynamo) -> None:
    """Calling a compiled body costs more than a token of one layer."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.eval(), fullgraph=True, backend=counter)
    with torch.no_grad():
        compiled(**inputs())
    assert counter.frame_count == 1
    with torch.no_grad():
        flat = compiled(**inputs()).logits
    assert_close(model(**inputs()).logits, flat, factor=10)


def test_with_gradient_checkpointing(model: nn.Module, fresh_dynamo) -> None:
    expected = gradients(model, lambda m: m(**inputs()))
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, lambda m: m(**inputs())), expected, factor=1)
    assert bodies(model)[1:-1] == ["_body_1"] * LAYERS

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    values = torch.autograd.grad(compiled(**inputs()).loss, list(vectors_of(model).values()))
    assert_same_gradients(dict(zip(expected, values, strict=True)), expected)
    assert counter.frame_count <= 4


def test_replaced_parameters_are_read_live(model: nn.Module) -> None:
    model.eval()
    first = model(**inputs()).logits
    layer = model.model.layers[2].mlp.down_proj
    old = layer.weight
    layer.weight = nn.Parameter(old.detach() * 2, requires_grad=False)
    assert not torch.equal(model(**inputs()).logits, first)
    layer.weight = old
    assert torch.equal(model(**inputs()).logits, first)


def test_encoder_and_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=5, num_heads=4,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    base = T5ForConditionalGeneration(config).eval()
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=6, target_modules=["q", "k", "v", "wo"]))
    fill_vectors(model)
    flat = vera_fx.unload(copy.deepcopy(model), merge=True)

    assert_close(model(**inputs()).logits, flat(**inputs()).logits, factor=50)
    # The first layer of each half computes the position bias, and the decoder's first multiplies
    # the encoder's output by A for all others.
    assert len(set(bodies(model))) < len(bodies(model)) - 2


@pytest.mark.parametrize("value", ["-1", "many"])
def test_a_knob_with_a_wrong_value(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("VERA_FX_OUTLINE", value)
    with pytest.raises(vera_fx.ConfigError, match="VERA_FX_OUTLINE must be a number"):
        model(**inputs())
