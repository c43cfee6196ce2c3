"""Layers that graphs call: what the plain model of the same weights computes, in every way to run it."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import (
    assert_close,
    assert_far_apart,
    fill_adapters,
    fill_vectors,
    gradients,
    vectors_of,
)
from tests.models import llama, text_inputs
from tests.products.opaque_layers import LAYERS, dense_twin, layer, replaced

TARGETS = ["q_proj", "v_proj", "down_proj"]
QUANTISED = (
    "q_proj",
    "v_proj",
    "up_proj",
    "down_proj",
)  # k, o and gate stay plain; up is no target
INPUTS = text_inputs()


def config(plan: str = "auto", r: int = 3) -> vera_fx.VeraConfig:
    return vera_fx.VeraConfig(r=r, target_modules=TARGETS, plan=plan)


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return replaced(llama(), name, QUANTISED)


def pair(name: str, plan: str = "auto") -> tuple[nn.Module, nn.Module]:
    """The adapted model, and the adapted plain model of the same weights."""
    plain = dense_twin(copy.deepcopy(base(name)))
    models = vera_fx.adapt(base(name), config(plan)), vera_fx.adapt(plain, config("factored"))
    for model in models:
        fill_vectors(model)
    return models


def loss(model: Any) -> Tensor:
    return model(**INPUTS).loss


@pytest.mark.parametrize("plan", ["factored", "scaled", "auto"])
@pytest.mark.parametrize("name", LAYERS)
def test_as_the_plain_model_of_its_weights(name: str, plan: str) -> None:
    model, plain = pair(name, plan)
    assert_close(model(**INPUTS).logits, plain(**INPUTS).logits, factor=5)
    with vera_fx.disable_adapters(model):
        assert_far_apart(model(**INPUTS).logits, plain(**INPUTS).logits)
    ours, theirs = (gradients(m, lambda m: m(**INPUTS)) for m in (model, plain))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert_close(value, theirs[key], factor=20, what=key)
    targets = vera_fx.explain(model).targets
    assert {row.base for row in targets} == {LAYERS[name][2]}
    wanted = {"factored", "scaled"} if plan == "auto" else {plan}
    (graph,) = [graph for graph in vera_fx.explain(model).graphs if graph.mode == "train"][:1]
    assert {site.plan for site in graph.plans} <= wanted


def test_three_steps_and_no_capture_more() -> None:
    """The layers' own notes (how often they ran) are not the graph's business."""
    models = pair("gptq")
    optimizers = [torch.optim.AdamW(vectors_of(m).values(), lr=0.05) for m in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    for (key, ours), theirs in zip(
        vectors_of(models[0]).items(), vectors_of(models[1]).values(), strict=True
    ):
        assert_close(ours.detach(), theirs.detach(), factor=20, what=key)
    assert vera_fx.explain(models[0]).kept.made == 1


def test_compiled_without_breaks_or_recompiles(fresh_dynamo: Any) -> None:
    model, plain = pair("fp8")
    vera_fx.add_adapter(model, "small", config(r=2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    short = {name: value[:2, :5] for name, value in INPUTS.items()}
    for inputs in (INPUTS, short):
        compiled(**inputs).loss.backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs in (INPUTS, short):
            assert_close(compiled(**inputs).logits, plain(**inputs).logits, factor=5)
        vera_fx.set_adapter(model, "small")
        compiled(**INPUTS).loss.backward()
    assert not fresh_dynamo["graph_break"]


def test_outlined_layers_share_a_body(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: Any) -> None:
    monkeypatch.setenv("VERA_FX_OUTLINE", "2")
    torch.manual_seed(0)
    deep = replaced(llama(4), "awq", QUANTISED)
    plain = vera_fx.adapt(dense_twin(copy.deepcopy(deep)), config("factored"))
    model = vera_fx.adapt(deep, config())
    for each in (model, plain):
        fill_vectors(each)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = gradients(model, lambda _: compiled(**INPUTS))
    for key, value in gradients(plain, lambda m: m(**INPUTS)).items():
        assert_close(ours[key], value, factor=20, what=key)
    assert not fresh_dynamo["graph_break"]


def test_rows_with_adapters_of_their_own() -> None:
    model, _ = pair("aqlm")
    vera_fx.add_adapter(model, "small", config(r=2))
    fill_adapters(model)
    model.eval()
    ids = {"input_ids": INPUTS["input_ids"]}
    with torch.no_grad():
        names = ["small", "default", "__base__"][: len(ids["input_ids"])]
        mixed = model(**ids, adapter_names=names).logits
        for row, name in enumerate(names):
            with (
                vera_fx.disable_adapters(model) if name == "__base__" else warnings.catch_warnings()
            ):
                if name != "__base__":
                    vera_fx.set_adapter(model, name)
                assert_close(mixed[row], model(**ids).logits[row], factor=5, what=name)


def test_checkpointed_and_generated() -> None:
    model, plain = pair("eetq")
    model.gradient_checkpointing_enable()
    ours = gradients(model, lambda m: m(**INPUTS))
    for key, value in gradients(plain, lambda m: m(**INPUTS)).items():
        assert_close(ours[key], value, factor=20, what=key)
    model.gradient_checkpointing_disable()
    answers = [
        m.eval().generate(INPUTS["input_ids"][:2], max_new_tokens=5, do_sample=False)
        for m in (model, plain)
    ]
    assert torch.equal(*answers)


def test_copies_and_files(tmp_path: Any) -> None:
    model, _ = pair("compressed")
    expected = model(**INPUTS).logits
    assert torch.equal(copy.deepcopy(model)(**INPUTS).logits, expected)
    vera_fx.save_adapter(model, tmp_path)
    again = vera_fx.load_adapter(base("compressed"), tmp_path)
    assert_close(again(**INPUTS).logits, expected.detach(), factor=5)


@pytest.mark.parametrize("name", LAYERS)
def test_unloading_with_the_adapter_gives_plain_modules(name: str) -> None:
    model, _ = pair(name)
    expected = model(**INPUTS).logits
    plain = vera_fx.unload(model, merge=True)
    assert not any(hasattr(module, "dense") for module in plain.modules())
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    assert_close(plain(**INPUTS).logits, expected, factor=5)


@pytest.mark.parametrize("form", ["merged", "constant", "input"])
def test_programs_are_plain(form: str) -> None:
    model, _ = pair("gptq")
    model.eval()
    ids = {"input_ids": INPUTS["input_ids"]}
    with pytest.warns(UserWarning, match="8 quantised modules leave as dense weights"):
        program = vera_fx.export_program(model, kwargs=ids, form=form)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in", "sym_")) for name in names), names
    given = {"vectors": vera_fx.program_vectors(model)} if form == "input" else {}
    assert_close(program.module()(**ids, **given)["logits"], model(**ids).logits, factor=5)


def test_what_is_refused() -> None:
    for plan in ("merged", "dense"):
        with pytest.raises(
            vera_fx.TargetError, match=r"reads the base's weight.*'factored', 'scaled'"
        ):
            vera_fx.adapt(base("gptq"), config(plan))
    model, _ = pair("gptq")
    with pytest.raises(vera_fx.AdapterError, match=r"gptqmodel, 4 bit.*unload\(merge=True\)"):
        vera_fx.merge(model)
    saved = vera_fx.VeraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(vera_fx.TargetError, match="quantised weights .* do not train"):
        vera_fx.adapt(base("gptq"), saved)


class Peeks(nn.Module):
    """Uses the weight of a layer past the layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = layer("eetq", nn.Linear(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + self.lin.weight.to(x.dtype).sum()


def test_a_weight_used_past_its_module_is_an_error() -> None:
    model = vera_fx.adapt(Peeks(), vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    with pytest.raises(vera_fx.TargetError, match=r"'lin.weight' is read by code other than 'lin'"):
        model(torch.randn(3, 4))


class Blocks(nn.Module):
    """No gradient to its input, as products of rounded activations have none."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.codes = nn.Buffer(torch.randint(-9, 9, (4, 6), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().round() @ self.codes.to(x.dtype).T


def test_a_layer_without_gradients_is_told() -> None:
    model = nn.Sequential(nn.Linear(5, 6), Blocks())
    vera_fx.adapt(model, vera_fx.VeraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="Blocks passes no gradient on to its input"):
        model(torch.randn(3, 5))


@pytest.mark.parametrize("name", LAYERS)
def test_a_bias_is_added_once(name: str) -> None:
    """By the layer in graphs, by the plain module after unloading, by the program that leaves."""
    torch.manual_seed(0)
    biased = nn.Sequential(layer(name, nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 5))
    plain = dense_twin(copy.deepcopy(biased))
    for net in (biased, plain):
        vera_fx.adapt(net, vera_fx.VeraConfig(r=3, target_modules=["0", "2"]))
        fill_vectors(net)
    x = torch.randn(3, 4)
    expected = plain(x).detach()
    assert_close(biased(x).detach(), expected, factor=5)
    with pytest.warns(UserWarning, match="1 quantised modules leave"):
        program = vera_fx.export_program(biased.eval(), (x,))
    assert_close(program.module()(x), expected, factor=5)
    assert_close(vera_fx.unload(biased, merge=True)(x), expected, factor=5)


def test_an_unload_that_fails_leaves_the_layers() -> None:
    model, _ = pair("gptq")
    expected = model(**INPUTS).logits.detach()
    vector = next(p for n, p in vectors_of(model).items() if n.endswith("lambda_b"))
    kept = vector.detach().clone()
    vector.data.fill_(float("nan"))
    with pytest.raises(vera_fx.AdapterError, match="would have NaN or infinity"):
        vera_fx.unload(model, merge=True)
    vector.data.copy_(kept)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "TorchQuantLinear"
    assert torch.equal(model(**INPUTS).logits, expected)
