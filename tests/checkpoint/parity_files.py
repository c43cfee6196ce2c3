"""What the tests of adapters on disk share: one model for both libraries, and their files."""

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.helpers import adapted_by_peft, adapted_by_us, fill_adapters
from tests.models import small_llama

X = torch.randn(5, 10, generator=torch.Generator().manual_seed(3))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["lin0", "lin1"]}


class Layers(nn.Module):
    """Linear layers, a Conv1D, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.conv, self.norm = nn.Linear(10, 20), Conv1D(12, 20), nn.LayerNorm(12)
        self.lin1, self.head = nn.Linear(12, 7, bias=False), nn.Linear(7, 3)
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(torch.tanh(self.lin0(x))))
        return self.head(torch.tanh(self.lin1(hidden)))


def layers() -> nn.Module:
    torch.manual_seed(0)
    return Layers().eval()


def peft_model(base: nn.Module, name: str = "default", **fields: Any) -> peft.PeftModel:
    return adapted_by_peft(base, name, **FIELDS | fields)


def our_model(base: nn.Module, name: str = "default", **fields: Any) -> nn.Module:
    return adapted_by_us(base, name, **FIELDS | fields)


def disturb(*models: nn.Module) -> None:
    """Give everything that trains values of its own, the same in both libraries."""
    for model in models:
        fill_adapters(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad and "vera_lambda" not in name:
                    p.add_(torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(p.dtype))


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    values = json.loads((folder / CONFIG).read_text())
    if isinstance(values["target_modules"], list):
        values["target_modules"].sort()
    return load_file(folder / WEIGHTS), values


def tiny_llama(folder: Path, *, tie: bool = False) -> nn.Module:
    """A Llama that was saved to ``folder`` and loaded from there."""
    model = small_llama(23, tie=tie)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()
