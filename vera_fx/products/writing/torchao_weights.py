"""Merging into torchao's weights: tensor subclasses that their own class quantises again.

Such a tensor keeps what it was made with, except how its scales were chosen. Of the ways that its class
offers, the one is taken that gives the present weight back best, and none where none gives it back.
"""

import inspect
import math
import re
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from vera_fx.errors import first_line
from vera_fx.products.writing.rewriting import FOUR_BITS, Rewriting, parameter_of, restore_parameter

_CHOSEN_ANEW = ("scale", "zero_point", "custom_scale", "custom_zero_point")
"""Arguments that `from_hp` computes where they are not given, from the values."""

_MAPPINGS = ("SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC")


def _weight(module: nn.Module) -> Any:
    held: Any = module.weight
    return held.data


def _library(room: str) -> Any:
    return import_module(f"torchao.quantization.{room}")


def read(module: nn.Module) -> Tensor | None:
    """The weight as its class dequantises it: layers that round their input would not say it exactly."""
    weight = _weight(module)
    if getattr(weight, "act_pre_scale", None) is not None:
        return None
    return weight.dequantize()


def refusal(module: nn.Module) -> str | None:
    """Where the weight cannot be made again from its values."""
    weight = _weight(module)
    kind = type(weight).__name__
    if weight.is_meta:
        return None
    if getattr(weight, "act_pre_scale", None) is not None:
        return f"({kind}) goes with scales of the activations, which a changed weight would not fit"
    if not hasattr(type(weight), "from_hp") or not isinstance(
        getattr(weight, "scale", None), Tensor
    ):
        return f"({kind}) is of a class that does not quantise values again (from_hp)"
    try:
        moved = _moved(weight, _remake(weight, weight.dequantize()))
    except Exception as error:  # whatever a foreign library raises
        return f"({kind}) was not quantised again by its own class ({first_line(error)})"
    if moved > 1:
        return f"({kind}) is not what its own class makes of its values: re-quantised unchanged, it moves"
    return None


def write(module: nn.Module, dense: Tensor) -> None:
    """Write a matrix, quantised as the weight is."""
    layer: Any = module
    made = _remake(_weight(module), dense)
    layer.weight = nn.Parameter(made, requires_grad=layer.weight.requires_grad)


def is_coarse(module: nn.Module) -> bool:
    """By the name of the dtype that the values are in, or of the class."""
    weight = _weight(module)
    name = str(getattr(weight, "target_dtype", type(weight).__name__))
    bits = re.search(r"(\d+)", name)
    return bits is not None and int(bits[1]) <= FOUR_BITS


def _remake(weight: Any, dense: Tensor) -> Any:
    """``dense`` as the weight's class quantises it, by the weight's own parameters."""
    names = list(inspect.signature(type(weight).from_hp).parameters)[1:]
    given = {name: _argument(weight, name) for name in names if _is_known(weight, name)}
    make = partial(type(weight).from_hp, **given)
    if "mapping_type" not in names:
        return make(dense)
    types = [getattr(_library("quant_primitives").MappingType, name) for name in _MAPPINGS]
    now = weight.dequantize()
    best = min(types, key=lambda kind: _moved(weight, make(now, mapping_type=kind)))
    return make(dense, mapping_type=best)


def _is_known(weight: Any, name: str) -> bool:
    if name in ("granularity", "float8_dtype"):
        return True
    return name not in (*_CHOSEN_ANEW, "mapping_type") and hasattr(weight, name)


def _argument(weight: Any, name: str) -> Any:
    if name == "float8_dtype":
        return weight.qdata.dtype
    return _granularity(weight) if name == "granularity" else getattr(weight, name)


def _granularity(weight: Any) -> Any:
    """What the class was told for blocks of this shape."""
    rooms = _library("granularity")
    block, shape = tuple(weight.block_size), tuple(weight.shape)
    if block == shape:
        return rooms.PerTensor()
    return rooms.PerRow() if block == (1, shape[1]) else rooms.PerGroup(block[1])


def _moved(weight: Any, made: Any) -> float:
    """How far the values are from the weight's, in units of what rounding to its steps costs on average."""
    off = (made.dequantize() - weight.dequantize()).float().square().mean().sqrt()
    step = weight.scale.float().square().mean().sqrt() / math.sqrt(12)
    return float(off / step.clamp(min=torch.finfo(torch.float32).tiny))


REWRITING = Rewriting(write, parameter_of, restore_parameter, is_coarse, refusal, read)
