"""The methods that are compared, each as a function that makes one training step."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import vera_fx
from benchmarks.cases import Case


@dataclass
class System:
    """One method on one case.

    Attributes:
        name: how tables call it.
        model: what is called; compiled or not.
        trained: parameters whose gradients a step computes.
    """

    name: str
    model: Any
    trained: list[nn.Parameter]

    def step(self, inputs: dict[str, Any]) -> Tensor:
        """Forward and backward; gradients are dropped, no optimiser runs."""
        output = self.model(**inputs)[0].float()
        # A square would do nothing behind a norm, whose output has the same length whatever it is.
        loss = (output * _weights(output.shape, output.device)).sum()
        loss.backward()
        for parameter in self.trained:
            parameter.grad = None
        for value in inputs.values():
            if isinstance(value, Tensor):
                value.grad = None
        return loss.detach()


@functools.cache
def _weights(shape: torch.Size, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device)


def floor(base: nn.Module, _: Case) -> nn.Module:
    """The frozen base: forward and the gradient of the input, which no adapter can do without."""
    return copy.deepcopy(base).requires_grad_(requires_grad=False)


def peft_vera(base: nn.Module, case: Case) -> nn.Module:
    """PEFT's VeRA."""
    targets = case.targets if isinstance(case.targets, str) else list(case.targets)
    config = peft.VeraConfig(r=case.r, target_modules=targets, save_projection=False)
    return randomised(peft.get_peft_model(copy.deepcopy(base), config))


def peft_lora(base: nn.Module, case: Case) -> nn.Module:
    """PEFT's LoRA at rank 8."""
    targets = case.targets if isinstance(case.targets, str) else list(case.targets)
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=8, target_modules=targets))


def ours(base: nn.Module, case: Case, plan: str = "auto") -> nn.Module:
    """vera_fx."""
    config = vera_fx.VeraConfig(r=case.r, target_modules=case.targets, plan=plan)
    return randomised(vera_fx.adapt(copy.deepcopy(base), config))


def randomised(model: nn.Module) -> nn.Module:
    """Vectors away from their identity start."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "vera_lambda_b" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


METHODS: dict[str, tuple[Callable[[nn.Module, Case], nn.Module], bool]] = {
    "floor": (floor, True),
    "peft eager": (peft_vera, False),
    "peft": (peft_vera, True),
    "lora r=8 eager": (peft_lora, False),
    "lora r=8": (peft_lora, True),
    "ours eager": (ours, False),
    "ours": (ours, True),
}
"""name: (how to make it, whether it is compiled)."""

ON_REQUEST = {"ours scaled": (functools.partial(ours, plan="scaled"), True)}
"""Methods that are measured only if they are named."""


def make(name: str, base: nn.Module, case: Case) -> System:
    """Build one method's model."""
    build, compiled = (METHODS | ON_REQUEST)[name]
    model = build(base, case)
    trained = [p for p in model.parameters() if p.requires_grad]
    return System(name, torch.compile(model) if compiled else model, trained)
