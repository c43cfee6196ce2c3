"""PEFT's VeRA on the same quantised base: outputs, gradients, steps and files."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import vera_fx
from tests.helpers import assert_close, fill_vectors, vectors_of
from tests.quantised.backends import BITSANDBYTES, INPUTS, TARGETS, WITH_PEFT, quantised

R = 5


def ours(name: str, dtype: torch.dtype = torch.float32, plan: str = "factored") -> Any:
    config = vera_fx.VeraConfig(r=R, target_modules=TARGETS, plan=plan)
    model = vera_fx.adapt(quantised(name, dtype), config)
    fill_vectors(model)
    return model


def unpacked(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """For PEFT, where one call without gradients would make all later gradients wrong."""
    model = quantised(name, dtype)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def theirs(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = unpacked(name, dtype)
    model = peft.get_peft_model(model, peft.VeraConfig(r=R, target_modules=TARGETS))
    fill_vectors(model)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    vectors = vectors_of(model)
    values = torch.autograd.grad(model(**INPUTS).loss, list(vectors.values()))
    return dict(zip(vectors, values, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", WITH_PEFT)
def test_outputs_to_the_bit_and_gradients(name: str, dtype: torch.dtype) -> None:
    mine, peers = ours(name, dtype), theirs(name, dtype)
    with torch.no_grad():
        assert torch.equal(mine(**INPUTS).logits, peers(**INPUTS).logits)
    result, expected = mine(**INPUTS), peers(**INPUTS)
    assert torch.equal(result.loss, expected.loss)
    found = gradients(mine)
    for key, value in gradients(peers).items():
        # Vectors are float32 beside bfloat16 bases; their gradients come through these.
        factor = 1 if dtype == torch.float32 else 500
        assert_close(found[key], value, factor=factor, what=key)


@pytest.mark.parametrize("plan", ["scaled", "auto"])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_three_steps(name: str, plan: str) -> None:
    models = ours(name, plan=plan), theirs(name)
    for model in models:
        optimizer = torch.optim.AdamW(vectors_of(model).values(), lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            model(**INPUTS).loss.backward()
            optimizer.step()
    found = vectors_of(models[0])
    for key, value in vectors_of(models[1]).items():
        assert_close(found[key].detach(), value.detach(), factor=50, what=key)


@pytest.mark.parametrize("name", ["nf4", "int8", "hqq-4", "quanto-8"])
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    mine, peers = ours(name), theirs(name)
    expected = peers(**INPUTS).logits
    vera_fx.save_adapter(mine, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(unpacked(name), str(tmp_path / "ours"))
    assert torch.equal(read(**INPUTS).logits, expected)
    peers.save_pretrained(str(tmp_path / "theirs"))
    back = vera_fx.load_adapter(quantised(name), tmp_path / "theirs")
    assert_close(back(**INPUTS).logits, expected.detach(), factor=5)
