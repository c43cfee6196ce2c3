"""Trained biases beside quantised weights: as PEFT trains them, switched, mixed, merged, saved."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_adapters, fill_vectors
from tests.quantised.backends import ALL, IDS, INPUTS, TARGETS, WITH_GRADIENTS, quantised

pytestmark = pytest.mark.filterwarnings("ignore:.*passes no gradient on to its input")
TRAIN = ("vera_only", "all")
WITH_PARAMETERS = tuple(name for name in ALL if not name.startswith("hqq"))
"""HQQ's bias is no parameter: nothing trains it, in PEFT as here."""


def config(bias: Any = "vera_only", **more: Any) -> Any:
    return vera_fx.VeraConfig(r=5, target_modules=TARGETS, bias=bias, **more)


def adapted(name: str, bias: Any = "vera_only", **more: Any) -> Any:
    return vera_fx.adapt(quantised(name, biased=True), config(bias, **more))


def unpacked(name: str) -> Any:
    model = quantised(name, biased=True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def theirs(name: str, bias: Any) -> Any:
    settings = peft.VeraConfig(r=5, target_modules=TARGETS, bias=bias)
    return peft.get_peft_model(unpacked(name), settings)


def biases(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained ones, by the end of their path that ours and PEFT's have in common."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    return {_key(name): parameter for name, parameter in own.items()}


def _key(name: str) -> str:
    for word in ("base_layer.", "base_model.model."):
        name = name.replace(word, "")
    parts = name.replace(":", ".").split(".")
    return ".".join(parts[parts.index("layers") :])


def trained(model: Any, steps: int = 3) -> Any:
    """Some steps, after which every bias is another one."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**INPUTS).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("bias", TRAIN)
@pytest.mark.parametrize("name", ["nf4", "int8", "quanto-8"])
def test_as_peft_trains_them(name: str, bias: str) -> None:
    mine, peers = adapted(name, bias, plan="factored"), theirs(name, bias)
    for model in (mine, peers):
        fill_vectors(model)
    assert torch.equal(mine(**INPUTS).loss, peers(**INPUTS).loss)  # nothing is trained yet
    assert len(biases(mine)) == (6 if bias == "vera_only" else 14)
    assert biases(mine).keys() == biases(peers).keys()
    before = {key: value.detach().clone() for key, value in biases(mine).items()}
    for model in (mine, peers):
        trained(model)
    found = biases(mine)
    for key, value in biases(peers).items():
        assert_close(found[key].grad, value.grad, factor=50, what=key)
        assert_close(found[key].detach(), value.detach(), factor=50, what=key)
        assert not torch.equal(found[key], before[key])
    assert_close(mine(**INPUTS).loss, peers(**INPUTS).loss, factor=20)


@pytest.mark.parametrize("bias", TRAIN)
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_files_both_ways(name: str, bias: str, tmp_path: Path) -> None:
    mine, peers = trained(adapted(name, bias)), trained(theirs(name, bias))
    for model in (mine, peers):
        fill_vectors(model)
    vera_fx.save_adapter(mine, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(unpacked(name), str(tmp_path / "ours"))
    assert_close(read(**INPUTS).logits, mine(**INPUTS).logits.detach(), factor=10)
    peers.save_pretrained(str(tmp_path / "theirs"))
    back = vera_fx.load_adapter(quantised(name, biased=True), tmp_path / "theirs")
    assert_close(back(**INPUTS).logits, peers(**INPUTS).logits.detach(), factor=10)


@pytest.mark.parametrize("name", [name for name in WITH_PARAMETERS if name in WITH_GRADIENTS])
def test_as_the_plain_model(name: str) -> None:
    plain = vera_fx.unload(vera_fx.adapt(quantised(name, biased=True), config("none")), merge=True)
    models = adapted(name, "all"), vera_fx.adapt(plain, config("all", plan="factored"))
    for model in models:
        fill_vectors(model)
        for number, value in enumerate(biases(model).values()):
            value.data += torch.linspace(-0.2, 0.3 + number / 9, len(value))
    factor = 500 if name.startswith("int8") else 10
    assert_close(models[0](**INPUTS).logits, models[1](**INPUTS).logits, factor=factor)
    found, wanted = (
        torch.autograd.grad(model(**INPUTS).loss, list(biases(model).values())) for model in models
    )
    for key, mine, reference in zip(biases(models[0]), found, wanted, strict=True):
        assert_close(mine, reference, factor=factor * 5, what=key)


@pytest.mark.parametrize("name", ["nf4", "int8", "ao-int8", "quanto-4"])
@torch.no_grad()
def test_switched_off_mixed_and_merged(name: str) -> None:
    base = unpacked(name)(**INPUTS).logits
    model = adapted(name)
    vera_fx.add_adapter(model, "other", config("none"))
    fill_adapters(model)
    for value in biases(model).values():
        value.data += torch.linspace(-0.5, 0.5, len(value))
    alone = [model(**INPUTS).logits]
    vera_fx.set_adapter(model, "other")
    alone.append(model(**INPUTS).logits)
    with vera_fx.disable_adapters(model):
        assert torch.equal(model(**INPUTS).logits, base)
    mixed = model(input_ids=IDS, adapter_names=["default", "other", "__base__"]).logits
    for row, expected in enumerate((*alone, base)):
        assert_close(mixed[row], expected[row], factor=20)
    assert_far_apart(mixed[0], alone[1][0])
    vera_fx.set_adapter(model, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vera_fx.merge(model, requantise=True)
    assert torch.linalg.norm(model(**INPUTS).logits - alone[0]) < 0.5 * torch.linalg.norm(
        base - alone[0]
    )
    vera_fx.unmerge(model)
    assert torch.equal(model(**INPUTS).logits, alone[0])
    plain = vera_fx.unload(model, merge=True)
    assert_close(plain(**INPUTS).logits, alone[0], factor=500 if name == "int8" else 10)


@pytest.mark.parametrize("name", ["nf4", "ao-int8"])
def test_compiled(name: str, fresh_dynamo: Any) -> None:
    model = trained(adapted(name)).train()
    fill_vectors(model)
    expected = torch.autograd.grad(model(**INPUTS).loss, list(biases(model).values()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**INPUTS).loss, list(biases(model).values()))
    for mine, reference in zip(found, expected, strict=True):
        assert_close(mine, reference, factor=50)
    assert not fresh_dynamo["graph_break"]


@pytest.mark.parametrize("name", ["nf4", "int8", "ao-int8", "quanto-8"])
def test_whole_quantised_modules_do_not_train(name: str) -> None:
    model = quantised(name, biased=True)
    with pytest.raises(vera_fx.TargetError, match=r"o_proj.*do not train; keep it from being"):
        vera_fx.adapt(model, config("none", modules_to_save=["o_proj"]))
