"""Methods: what is put on a base, what of it trains, and which learning rates were tried."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import vera_fx
from benchmarks.quality import ablations

HEAD = "classifier"
HEAD_RATE = 4e-3
"""Of the head under every method but `head` itself, whose rate is swept."""

SLOW, LORA, FAST = (3e-5, 1e-4, 3e-4), (3e-4, 1e-3, 3e-3, 1e-2), (1e-2, 3e-2, 1e-1)
Fields = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One way to adapt.

    Attributes:
        kind: a key of `KINDS`.
        fields: of the configuration.
        rates: learning rates to try; empty to take those that another method was found to like.
        like: that method.
        change: what an ablation changes of the adapted model.
    """

    kind: str
    fields: Fields = field(default_factory=dict[str, Any])
    rates: tuple[float, ...] = ()
    like: str = ""
    change: Callable[[nn.Module], None] | None = None

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        """The model, adapted; random parts are drawn from the seed."""
        torch.manual_seed(seed)
        found = KINDS[self.kind](model, self.fields, seed)
        if self.change is not None:
            self.change(found)
        return found


def _head(model: nn.Module, _fields: Fields, _seed: int) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD))
    return model


def _full(model: nn.Module, _fields: Fields, _seed: int) -> nn.Module:
    return model


def _vera(model: nn.Module, fields: Fields, seed: int) -> nn.Module:
    return vera_fx.adapt(model, vera_config(fields, seed))


def vera_config(fields: Fields, seed: int) -> vera_fx.VeraConfig:
    """The configuration of a VeRA method."""
    return vera_fx.VeraConfig(modules_to_save=[HEAD], projection_prng_key=seed, **fields)


def _dvora(model: nn.Module, fields: Fields, seed: int) -> nn.Module:
    config = vera_fx.DVoraConfig(modules_to_save=[HEAD], projection_prng_key=seed, **fields)
    return vera_fx.adapt(model, config)


def _own_projections(model: nn.Module, fields: Fields, seed: int) -> nn.Module:
    return ablations.own_projections(model, fields, seed, HEAD)


def _peft_vera(model: nn.Module, fields: Fields, seed: int) -> nn.Module:
    import peft

    config = peft.VeraConfig(modules_to_save=[HEAD], projection_prng_key=seed, **fields)
    return peft.get_peft_model(model, config)


def _lora(model: nn.Module, fields: Fields, _seed: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(modules_to_save=[HEAD], lora_alpha=2 * fields["r"], **fields)
    return peft.get_peft_model(model, config)


KINDS: dict[str, Callable[[nn.Module, Fields, int], nn.Module]] = {
    "head": _head, "full": _full, "vera": _vera, "dvora": _dvora, "lora": _lora,
    "peft_vera": _peft_vera, "own": _own_projections,
}  # fmt: skip

QV = ["query", "value"]
_WIDE = (*FAST, 3e-1)
_TEXT = {"r": 256, "target_modules": QV}
_IMAGE = {"r": 64, "target_modules": ["q_proj", "v_proj"]}
_MAIN = "VeRA r=256"

TEXT: dict[str, Method] = {
    "head": Method("head", rates=_WIDE),
    "VeRA r=256": Method("vera", _TEXT, FAST),
    "DVoRA r=256": Method("dvora", _TEXT, FAST),
    "LoRA r=8": Method("lora", {**_TEXT, "r": 8}, LORA),
    "full": Method("full", rates=SLOW),
}
"""What stands in the first table, on every domain."""

IMAGES: dict[str, Method] = {
    "head": Method("head", rates=_WIDE),
    "VeRA r=64": Method("vera", _IMAGE, _WIDE),
    "DVoRA r=64": Method("dvora", _IMAGE, _WIDE),
    "LoRA r=8": Method("lora", {**_IMAGE, "r": 8}, (3e-3, 1e-2, 3e-2, 1e-1)),
    "full": Method("full", rates=(3e-4, 1e-3, 3e-3, 1e-2)),
}

PEFT = {"PEFT's VeRA r=256": Method("peft_vera", _TEXT, like=_MAIN)}

SIZES: dict[str, Method] = {
    "VeRA r=64": Method("vera", {**_TEXT, "r": 64}, FAST),
    "VeRA r=1024": Method("vera", {**_TEXT, "r": 1024}, FAST),
    "VeRA r=256, all linear": Method("vera", {"r": 256, "target_modules": "all-linear"}, FAST),
    "LoRA r=1": Method("lora", {**_TEXT, "r": 1}, LORA[1:]),
}
"""More points of accuracy against parameters."""

ABLATIONS: dict[str, Method] = {
    "d_initial = 1": Method("vera", {**_TEXT, "d_initial": 1.0}, like=_MAIN),
    "d_initial = 1e-7": Method("vera", {**_TEXT, "d_initial": 1e-7}, like=_MAIN),
    "only b trains": Method("vera", _TEXT, like=_MAIN, change=ablations.only_b),
    "only d trains, from 0, b = 1": Method("vera", _TEXT, like=_MAIN, change=ablations.only_d),
    "A, B Kaiming normal": Method("vera", _TEXT, like=_MAIN, change=ablations.normal),
    "A, B uniform in [0, 0.1]": Method("vera", _TEXT, like=_MAIN, change=ablations.positive),
    "A, B of each site's own": Method("own", _TEXT, like=_MAIN),
}

ALL: dict[str, Method] = {**TEXT, **PEFT, **SIZES, **ABLATIONS}


def methods_of(task: str) -> dict[str, Method]:
    """The methods of a task's first table."""
    return IMAGES if task == "digits" else TEXT


def method(task: str, name: str) -> Method:
    """A method by its name; the same name may mean other targets for another task."""
    return (ALL if task != "digits" else {**ALL, **IMAGES})[name]


def groups(model: nn.Module, kind: str, lr: float) -> list[dict[str, Any]]:
    """Parameter groups: vectors, LoRA's matrices or the base at ``lr``, the head at `HEAD_RATE`."""
    if kind == "head":
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]
    if kind in {"vera", "dvora", "own"}:
        return vera_fx.parameter_groups(model, lr=lr, head_lr=HEAD_RATE)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    body = [p for n, p in named if HEAD not in n]
    head = [p for n, p in named if HEAD in n]
    return [{"params": body, "lr": lr}, {"params": head, "lr": HEAD_RATE}]
