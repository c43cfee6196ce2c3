"""Adapted models and calls that the export tests share."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import fill_vectors, main_output
from tests.models import BY_NAME, tokens
from vera_fx.mixing.check import BASE

FORMS = ("merged", "constant", "input", "rows")


def adapted(name: str, **config) -> tuple[nn.Module, nn.Module]:
    family = BY_NAME[name]
    base = family.build().eval()
    settings = vera_fx.VeraConfig(**{"r": 6, **family.config, **config})
    model = vera_fx.adapt(copy.deepcopy(base), settings).eval()
    fill_vectors(model)
    with torch.no_grad():
        for _, _, tensor in model.vera.adapter("default").copied_tensors():
            tensor.add_(0.1)
    return base, model


def call_of(name: str, batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Inputs that stay inputs of the program: tensors only."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    if name == "mlp":
        return {"x": torch.randn(batch, 10, generator=generator)}
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"decoder_input_ids": tokens(batch, 5)} if name == "t5" else {})


def fixed_of(name: str) -> dict[str, bool]:
    return {"use_cache": False} if BY_NAME[name].generates else {}


def eager(model: nn.Module, name: str, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return main_output(model(**call, **fixed_of(name)))


def extra_of(model: nn.Module, form: str, call: dict[str, Tensor]) -> dict[str, Any]:
    """What a program of that form takes beside the call, for the active adapter in every row."""
    if form == "input":
        return {"vectors": vera_fx.program_vectors(model)}
    if form == "rows":
        (name,) = vera_fx.active_adapters(model)
        rows = len(next(iter(call.values())))
        stacked = vera_fx.program_vectors(model, [BASE, name])
        return {"vectors": stacked, "adapter_index": torch.ones(rows, dtype=torch.int64)}
    return {}
