"""Every plan and precision against PEFT on the same device, and what training is made of."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import fill_vectors, gradients, kept_tensors, peft_pair, vectors_of
from tests.models import llama, text_inputs
from vera_fx.passes import PLANS

ALLOWED = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 6e-2, "fp16": 2e-2, "autocast": 6e-2}
"""Largest difference of a gradient from PEFT's, as a share of the largest."""


def inputs(device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in text_inputs().items()}


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[torch.dtype]:
    """Inside the block products are in that precision; gives the base's dtype."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=name == "autocast")
    try:
        with autocast:
            yield {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("plan", ["auto", *PLANS])
def test_gradients_are_pefts(plan: str, name: str, device: torch.device) -> None:
    with precision(name, device) as dtype:
        base = llama().to(device, dtype)
        theirs, ours = peft_pair(base, plan=plan, target_modules="all-linear")
        expected = gradients(theirs, lambda m: m(**inputs(device)))
        compiled = torch.compile(ours)
        for call in (ours, compiled):
            actual = gradients(ours, lambda _, call=call: call(**inputs(device)))
            for key, value in expected.items():
                error = (actual[key] - value).abs().max() / value.abs().max().clamp_min(1e-6)
                assert error <= ALLOWED[name], f"{key}: {error:.2g}"


def adapted(device: torch.device, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = vera_fx.VeraConfig(r=6, target_modules="all-linear", **options)
    model = vera_fx.adapt(llama().to(device), config)
    fill_vectors(model)
    return model


def test_gradient_checkpointing(device: torch.device) -> None:
    model = adapted(device)
    expected = gradients(model, lambda m: m(**inputs(device)))
    kept = len(kept_tensors(lambda: model(**inputs(device)).loss))
    model.gradient_checkpointing_enable()
    actual = gradients(model, lambda m: m(**inputs(device)))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)
    assert len(kept_tensors(lambda: model(**inputs(device)).loss)) < kept


def test_dropout_draws_masks_on_the_device(device: torch.device) -> None:
    model = adapted(device, vera_dropout=0.5).train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**inputs(device)).loss)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_timing_the_plans_leaves_the_generators_alone(device: torch.device) -> None:
    model = adapted(device, plan="timed")
    torch.manual_seed(3)
    model(**inputs(device)).loss.backward()
    drawn = torch.rand(4, device=device)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device=device), drawn)


def test_trainer(device: torch.device, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = adapted(device)
    before = {name: value.detach().clone() for name, value in vectors_of(model).items()}
    row = {name: value[0].cpu() for name, value in text_inputs().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[],
        use_cpu=device.type == "cpu", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=[row] * 8).train()
    assert all(not torch.equal(before[n], value) for n, value in vectors_of(model).items())


def test_moves_between_devices(device: torch.device) -> None:
    model = adapted(torch.device("cpu")).eval()
    with torch.no_grad():
        expected = model(**inputs(torch.device("cpu"))).logits
        model.to(device)
        there = model(**inputs(device)).logits
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), expected, rtol=1e-3, atol=1e-3)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**inputs(device)).logits, there)
        assert torch.equal(model.cpu()(**inputs(torch.device("cpu"))).logits, expected)
