"""Every library: the plain model of its weights is the reference; compiled, generated, mixed, moved."""

import copy
import warnings
from typing import Any

import pytest
import torch

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_adapters, fill_vectors, vectors_of
from tests.quantised.backends import (
    ALL,
    IDS,
    INPUTS,
    TARGETS,
    WITH_GRADIENTS,
    quantised,
)
from vera_fx.products.opaque import is_opaque

SHORT = {name: value[:2, :7] for name, value in INPUTS.items()}


def config(r: int = 5, plan: str = "auto") -> vera_fx.VeraConfig:
    return vera_fx.VeraConfig(r=r, target_modules=TARGETS, plan=plan)


def adapted(name: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    model = vera_fx.adapt(quantised(name, dtype, layers), config())
    vera_fx.add_adapter(model, "small", config(r=3))
    fill_adapters(model)
    return model


def dense(name: str) -> Any:
    """The plain model of the very weights, by the library's own unloading."""
    model = vera_fx.unload(vera_fx.adapt(quantised(name), config()), merge=True)
    assert not any(is_opaque(module) for module in model.modules())
    model = vera_fx.adapt(model, config(plan="factored"))
    fill_vectors(model)
    return model


def gradients(model: Any, call: Any = None) -> dict[str, torch.Tensor]:
    vectors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(
        (model if call is None else call)(**INPUTS).loss, list(vectors.values())
    )
    return dict(zip(vectors, values, strict=True))


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_as_the_plain_model(name: str) -> None:
    model, plain = vera_fx.adapt(quantised(name), config()), dense(name)
    fill_vectors(model)
    # int8 products of bitsandbytes round their input as well.
    factor = 500 if name.startswith("int8") else 10
    assert_close(model(**INPUTS).logits, plain(**INPUTS).logits, factor=factor)
    with vera_fx.disable_adapters(model):
        assert_far_apart(model(**INPUTS).logits, plain(**INPUTS).logits)
    found = gradients(model)
    for key, value in gradients(plain).items():
        assert_close(found[key], value, factor=factor * 5, what=key)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_compiled(name: str, fresh_dynamo: Any) -> None:
    model = adapted(name).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model)
    for inputs in (INPUTS, SHORT):
        compiled(**inputs).loss.backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs in (INPUTS, SHORT):
            assert_close(compiled(**inputs).loss, model(**inputs).loss, factor=20)
        for key, value in gradients(model, compiled).items():
            assert_close(value, expected[key], factor=100, what=key)
        vera_fx.set_adapter(model, "small")
        assert_close(compiled(**INPUTS).loss, model(**INPUTS).loss, factor=20)
    assert not fresh_dynamo["graph_break"]


@pytest.mark.parametrize("name", ALL)
def test_generated_and_mixed(name: str) -> None:
    model = adapted(name)
    ids = IDS[:2, :7]
    alone = []
    for adapter in ("default", "small"):
        vera_fx.set_adapter(model, adapter)
        alone.append(model.generate(ids, max_new_tokens=6, do_sample=False))
    both = model.generate(
        ids, max_new_tokens=6, do_sample=False, adapter_names=["default", "small"]
    )
    assert torch.equal(both[0], alone[0][0])
    assert torch.equal(both[1], alone[1][1])


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_checkpointed(name: str) -> None:
    model = adapted(name).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    found = gradients(model)
    for key, value in expected.items():
        assert_close(found[key], value, factor=5, what=key)


def test_dynamic_int8_tells_that_it_has_no_gradient() -> None:
    model = vera_fx.adapt(quantised("ao-int8-dynamic"), config())
    with pytest.warns(UserWarning, match="passes no gradient on to its input"):
        model(**INPUTS)


@pytest.mark.parametrize("name", ALL)
def test_copies(name: str) -> None:
    """Where a library has no copies, its own words are what one gets."""
    model = adapted(name)
    expected = model(**INPUTS).logits
    try:
        copy.deepcopy(quantised(name))
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:40]):
            copy.deepcopy(model)
    else:
        assert torch.equal(copy.deepcopy(model)(**INPUTS).logits, expected)


@pytest.mark.parametrize("name", ["nf4", "int8", "ao-int8", "hqq-4", "quanto-8"])
@pytest.mark.parametrize("form", ["merged", "input"])
def test_programs_are_plain(name: str, form: str) -> None:
    model = adapted(name)
    ids = {"input_ids": IDS}
    with pytest.warns(UserWarning, match="leave as dense weights"):
        program = vera_fx.export_program(model, kwargs=ids, form=form)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in", "sym_")) for name in names), names
    given = {"vectors": vera_fx.program_vectors(model)} if form == "input" else {}
    factor = 500 if name == "int8" else 10
    with torch.no_grad():
        assert_close(program.module()(**ids, **given)["logits"], model(**ids).logits, factor=factor)


@pytest.mark.parametrize("name", ALL)
def test_explained(name: str) -> None:
    model = adapted(name)
    model(**INPUTS)
    words = {row.base for row in vera_fx.explain(model).targets}
    assert len(words) == 1
    wanted = {
        "nf4": "bitsandbytes, 4 bit NF4",
        "nf4-double": "bitsandbytes, 4 bit NF4, double quantisation",
        "fp4": "bitsandbytes, 4 bit FP4",
        "int8": "bitsandbytes, 8 bit",
        "int8-plain": "bitsandbytes, 8 bit",
        "ao-int8": "torchao, Int8Tensor",
        "ao-int8-dynamic": "torchao, Int8Tensor",
        "ao-float8": "torchao, Float8Tensor",
        "ao-int4": "torchao, IntxUnpackedToInt8Tensor",
        "hqq-4": "hqq, 4 bit",
        "quanto-8": "optimum-quanto, qint8",
        "quanto-4": "optimum-quanto, qint4",
    }
    assert words == {wanted[name]}


def test_only_some_layers_are_quantised() -> None:
    model, plain = quantised("nf4"), quantised("nf4")
    reference = vera_fx.unload(vera_fx.adapt(plain, config()), merge=True)
    model.model.layers[1].mlp.down_proj = copy.deepcopy(reference.model.layers[1].mlp.down_proj)
    vera_fx.adapt(model, config())
    vera_fx.adapt(reference, config(plan="factored"))
    for each in (model, reference):
        fill_vectors(each)
    assert_close(model(**INPUTS).logits, reference(**INPUTS).logits, factor=10)
    plans = {site.site: site.plan for site in vera_fx.explain(model).graphs[0].plans}
    assert len(plans) == len(vectors_of(model)) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(**INPUTS).logits
        vera_fx.merge(model, requantise=True)
        vera_fx.unmerge(model)
    assert_close(model(**INPUTS).logits, expected, factor=5)
