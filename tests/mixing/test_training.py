"""Batches that mix adapters in training: every adapter's gradients as if it trained alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, assert_far_apart, main_output
from tests.mixing.test_mixed import BASE, fill_all
from tests.models import BY_NAME, llama, param_names, text_inputs
from tests.products.opaque_layers import replaced

NAMES = ["a", BASE, "c", "b", "a", "b"]


def model_of(family: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Three adapters in two sets of projections, all filled; and six rows."""
    found = BY_NAME[family]
    torch.manual_seed(0)
    config = {"target_modules": "all-linear", **found.config, **options}
    model = vera_fx.adapt(found.build(), vera_fx.VeraConfig(r=4, **config), adapter_name="a")
    vera_fx.add_adapter(model, "b")
    vera_fx.add_adapter(model, "c", vera_fx.VeraConfig(r=3, projection_prng_key=7, **config))
    fill_all(model)
    inputs = {k: v for k, v in found.inputs().items() if k != "labels"}
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    rows = next(iter(inputs.values())).shape[0]
    index = [row % rows for row in range(len(NAMES))]
    for module in model.modules():  # random masks are no function of the rows
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        module.__dict__.update(
            {key: 0.0 for key, p in vars(module).items() if "drop" in key and isinstance(p, float)}
        )
    return model.train(), {key: value[index] for key, value in inputs.items()}


def row_losses(output: Tensor) -> Tensor:
    """One loss per row, which tells every element apart."""
    flat = output.float().flatten(1)
    return (flat * torch.linspace(-1, 1, flat.shape[1])).sum(1) + flat.square().mean(1)


def gradients_of(model: nn.Module, name: str) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in model.vera.adapter(name).named_parameters()}


def mixed(model: nn.Module, call: Any, inputs: dict[str, Tensor], names: list[str]) -> Tensor:
    """Losses by row, after a backward."""
    vera_fx.train_adapters(model, sorted({*names} - {BASE}))
    model.zero_grad()
    losses = row_losses(main_output(call(**inputs, adapter_names=names)))
    losses.sum().backward()
    return losses.detach()


def alone(
    model: nn.Module, inputs: dict[str, Tensor], names: list[str]
) -> Iterator[tuple[str, list[int], Tensor]]:
    """Each adapter on its rows: its name, the rows, their losses; gradients are on the model then."""
    for who in sorted({*names} - {BASE}):
        rows = [row for row, name in enumerate(names) if name == who]
        vera_fx.set_adapter(model, who)
        model.zero_grad()
        losses = row_losses(main_output(model(**{k: v[rows] for k, v in inputs.items()})))
        losses.sum().backward()
        yield who, rows, losses.detach()


def check(
    model: nn.Module,
    inputs: dict[str, Tensor],
    names: list[str] = NAMES,
    *,
    call: Any = None,
    factor: float = 10.0,
) -> None:
    losses = mixed(model, model if call is None else call, inputs, names)
    found = {who: gradients_of(model, who) for who in {*names} - {BASE}}
    for who, rows, expected in alone(model, inputs, names):
        assert_close(losses[rows], expected, factor=factor, what=who)
        for name, gradient in gradients_of(model, who).items():
            if gradient is None:
                assert found[who][name] is None or not found[who][name].any(), name
                continue
            assert found[who][name] is not None, f"{who} {name}"
            assert_close(found[who][name], gradient, factor=factor, what=f"{who} {name}")
            assert gradient.any(), name


@pytest.mark.parametrize("name", param_names("mlp", "bert", "llama", "gpt2", "vit"))
def test_gradients_as_if_alone(name: str) -> None:
    model, inputs = model_of(name)
    check(model, inputs)
    check(model.eval(), inputs, ["b", "b", "a", BASE, BASE, "c"])


def test_trained_biases_and_heads() -> None:
    model, inputs = model_of("bert", bias="all", modules_to_save=["pooler"])
    assert model.vera.adapter("a").copies.by_path.keys() >= {"pooler"} or any(
        "pooler" in path for path in model.vera.adapter("a").copies.by_path
    )
    check(model, inputs)


@pytest.mark.parametrize("how", ["bf16 base", "autocast"])
def test_half_precision(how: str) -> None:
    """To the rounding of bfloat16, in which sums over rows differ with the batch."""
    model, inputs = model_of("llama", plan="factored" if how == "autocast" else "auto")
    model = model.to(torch.bfloat16) if how == "bf16 base" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        losses = mixed(model, model, inputs, NAMES)
        found = {who: gradients_of(model, who) for who in "abc"}
        for who, rows, expected in alone(model, inputs, NAMES):
            assert (losses[rows] - expected).norm() < 0.03 * expected.norm(), who
            for name, gradient in gradients_of(model, who).items():
                error = (found[who][name] - gradient).norm() / gradient.norm()
                assert error < 0.1, f"{who} {name} {error}"


@pytest.mark.parametrize("name", ["aqlm", "gptq"])
def test_quantised_bases(name: str) -> None:
    """Graphs call such layers, and their weights are no tensors to read."""
    torch.manual_seed(0)
    model = replaced(llama(), name, ("q_proj", "v_proj", "up_proj", "down_proj"))
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    vera_fx.adapt(model.train(), vera_fx.VeraConfig(r=4, **options), adapter_name="a")
    vera_fx.add_adapter(model, "b")
    vera_fx.add_adapter(model, "c", vera_fx.VeraConfig(r=3, **options))
    fill_all(model)
    check(model, {"input_ids": text_inputs()["input_ids"][[0, 1, 2, 0, 1, 2]]})


def test_gradient_checkpointing() -> None:
    model, inputs = model_of("llama")
    losses = mixed(model, model, inputs, NAMES)
    plain = {who: gradients_of(model, who) for who in "abc"}
    model.gradient_checkpointing_enable()
    assert torch.equal(mixed(model, model, inputs, NAMES), losses)
    for who, gradients in plain.items():
        for name, gradient in gradients_of(model, who).items():
            assert_close(gradient, gradients[name], what=name)
    reports = [str(graph.report) for graph in vera_fx.explain(model).graphs]
    assert "CheckpointLayers" in reports[-1]


def test_compiled_without_recompiling() -> None:
    """For any mixture, the base alone included, and as adapters come and go."""
    torch._dynamo.reset()
    model, inputs = model_of("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check(model, inputs, call=compiled)
    vera_fx.train_adapters(model, ["a", "b", "c"])
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(**inputs, adapter_names=[BASE] * 6)
        check(model, inputs, ["b", "c", "c", "b", BASE, BASE], call=compiled)
        vera_fx.add_adapter(model, "later")
        fill_all(model)
        check(model, inputs, ["later", "a", "later", "b", "c", "a"], call=compiled)
        vera_fx.delete_adapter(model, "b")
        check(model, inputs, ["later", "a", "later", BASE, "c", "a"], call=compiled)


def test_only_the_base_and_frozen_adapters_leave_no_gradient() -> None:
    model, inputs = model_of("llama")
    vera_fx.set_trainable(model, "b", trainable=False)
    vera_fx.train_adapters(model, ["a", "c"])
    model(**inputs, adapter_names=["a", "b", BASE, "b", "b", BASE]).logits.sum().backward()
    assert all(g is not None and g.any() for g in gradients_of(model, "a").values())
    assert all(g is None for g in gradients_of(model, "b").values())
    assert all(g is None or not g.any() for g in gradients_of(model, "c").values())


def test_a_row_that_is_not_finite_hurts_no_other_adapter() -> None:
    model, inputs = model_of("llama")
    with torch.no_grad():
        next(model.vera.adapter("b").parameters()).fill_(float("nan"))
    losses = mixed(model, model, inputs, NAMES)
    assert losses[[3, 5]].isnan().all()
    assert losses[[0, 1, 2, 4]].isfinite().all()
    assert all(g.isfinite().all() for who in "ac" for g in gradients_of(model, who).values())


def test_dropout_of_the_adapters() -> None:
    model, inputs = model_of("mlp", vera_dropout=0.5)
    vera_fx.train_adapters(model, ["a", "b", "c"])
    key = next(iter(inputs))
    call = {key: inputs[key][[0] * 6]}
    first, second = (main_output(model(**call, adapter_names=NAMES)) for _ in range(2))
    assert_far_apart(first[0], second[0])
    assert_far_apart(first[0], first[4])  # one mask for each row
    assert_close(first[1].detach(), second[1].detach(), what="the base drops nothing")
    served = main_output(model.eval()(**call, adapter_names=NAMES))
    assert_close(served[0], served[4])


def test_dropout_that_differs_is_an_error() -> None:
    model, inputs = model_of("mlp")
    config = model.vera.adapter("a").config
    options = {"r": 4, "target_modules": config.target_modules, "vera_dropout": 0.5}
    vera_fx.add_adapter(model, "wet", vera_fx.VeraConfig(**options))
    fill_all(model)
    vera_fx.train_adapters(model, ["a", "b", "wet", "c"])
    key = next(iter(inputs))
    with pytest.raises(vera_fx.AdapterError, match="different dropout.*'wet': 0.5"):
        model(**inputs, adapter_names=["a", "wet", BASE, BASE, "c", "c"])
    same = main_output(model(**{key: inputs[key][[0] * 6]}, adapter_names=["wet"] * 6))
    assert_far_apart(same[0], same[1])


def test_who_trains() -> None:
    model, inputs = model_of("mlp")

    def training() -> set[str]:
        adapters = model.vera.adapters.items()
        return {n for n, adapter in adapters if all(p.requires_grad for p in adapter.parameters())}

    with pytest.raises(vera_fx.AdapterError, match=r"adapter_names\[0\] is 'b', which may train"):
        model(**inputs, adapter_names=["b"] * 6)
    assert training() == {"a"}
    vera_fx.train_adapters(model, ["b", "c"])
    assert training() == {"b", "c"}
    assert vera_fx.active_adapters(model) == ["a"]
    with vera_fx.disable_adapters(model):
        assert training() == set()
        output = main_output(model(**inputs, adapter_names=["b"] * 6))
        assert not output.requires_grad
    assert training() == {"b", "c"}
    vera_fx.delete_adapter(model, "b")
    assert training() == {"c"}
    vera_fx.set_adapter(model, "a")
    assert training() == {"a"}
    vera_fx.set_trainable(model, "c", trainable=False)
    for names, message in ((["c"], "made for inference"), (["nobody"], "nobody"), ("a", "list")):
        with pytest.raises(vera_fx.AdapterError, match=message):
            vera_fx.train_adapters(model, names)
    assert training() == {"a"}


def test_rows_that_meet_in_train_mode_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)).train()
    config = vera_fx.VeraConfig(r=3, target_modules=["2"])
    model = vera_fx.adapt(module, config, adapter_name="a")
    with pytest.raises(
        vera_fx.TargetError, match=r"adapter_names\[0\] is 'a', whose '2' cannot differ"
    ):
        model(torch.randn(3, 4), adapter_names=["a", BASE, "a"])
