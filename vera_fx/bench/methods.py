"""The methods that are compared, over one base whose weights they share."""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vera_fx

BASE, OURS, PEFT, LORA = "base", "vera_fx", "PEFT VeRA", "PEFT LoRA"


@dataclass(frozen=True)
class Adapters:
    """What every method adapts.

    Attributes:
        rank: of VeRA.
        targets: names of modules; None for the architecture's.
        lora_rank: of LoRA.
    """

    rank: int
    targets: Sequence[str] | None
    lora_rank: int


@dataclass
class Method:
    """One method on one model.

    Attributes:
        name: how tables call it.
        model: what is called; compiled or not.
        trained: parameters that an optimiser steps.
        inputs: what the model is called with.
    """

    name: str
    model: Any
    trained: list[nn.Parameter]
    inputs: dict[str, Tensor]

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None

    def step(self) -> None:
        """Forward, backward, and a step of AdamW; the base has gradients of its input alone."""
        given = {name: value.detach() for name, value in self.inputs.items()}
        first = next(value for value in given.values() if value.is_floating_point())
        first.requires_grad_()
        self.model.train()
        output = self.model(**given)[0].float()
        # A plain square would have no gradient behind a norm.
        (output * torch.linspace(-1, 1, output.shape[-1], device=output.device)).mean().backward()
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()

    @torch.no_grad()
    def call(self) -> None:
        """A call without gradients."""
        self.model.eval()
        self.model(**self.inputs)


def has_peft() -> bool:
    """Whether PEFT is there to compare with."""
    return importlib.util.find_spec("peft") is not None


def methods(
    base: nn.Module, inputs: dict[str, Tensor], adapters: Adapters, *, compiled: bool
) -> list[Method]:
    """The frozen base, vera_fx, and PEFT's VeRA and LoRA where PEFT is installed.

    Raises:
        VeraFxError: the targets are not there, or none are known.
    """
    base.requires_grad_(requires_grad=False)
    ours: Any = vera_fx.adapt(
        _twin(base), vera_fx.VeraConfig(r=adapters.rank, target_modules=adapters.targets)
    )
    models: dict[str, Any] = {BASE: base, OURS: ours}
    if has_peft():
        found = ours.vera.adapter("default").config.target_modules
        targets = found if isinstance(found, str) else list(found)
        models |= _peft(base, targets, adapters)
    return [
        Method(
            name,
            torch.compile(model) if compiled else model,
            [p for p in model.parameters() if p.requires_grad],
            inputs,
        )
        for name, model in models.items()
    ]


def _peft(base: nn.Module, targets: Any, adapters: Adapters) -> dict[str, Any]:
    import peft

    vera = peft.VeraConfig(r=adapters.rank, target_modules=targets)
    lora = peft.LoraConfig(r=adapters.lora_rank, target_modules=targets)
    made: dict[str, Callable[[], Any]] = {
        PEFT: lambda: peft.get_peft_model(_twin(base), vera),
        LORA: lambda: peft.get_peft_model(_twin(base), lora),
    }
    return {name: make() for name, make in made.items()}


def _twin(base: nn.Module) -> nn.Module:
    """Another model over the same weights, which nobody trains."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)
