"""Tiny models over weights of every library that is installed here."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))
INPUTS = {"input_ids": IDS, "labels": IDS}


def plain(dtype: torch.dtype = torch.float32, layers: int = 2, *, biased: bool = False) -> Any:
    """Sizes are multiples of 64, which bitsandbytes' kernels ask for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, attention_bias=biased, mlp_bias=biased,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def _is_wanted(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in path


def _swapped(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for path, module in list(model.named_modules()):
        if _is_wanted(module, path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(module))
    return model


def bnb_4bit(kind: str, *, double: bool = False) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    def make(old: nn.Linear) -> nn.Module:
        sizes, has_bias = (old.in_features, old.out_features), old.bias is not None
        new = Linear4bit(*sizes, bias=has_bias, compute_dtype=old.weight.dtype)
        new.weight = Params4bit(
            old.weight.detach().clone(),
            requires_grad=False,
            quant_type=kind,
            compress_statistics=double,
            module=new,
        )
        new.bias = old.bias
        return new

    return lambda model: _swapped(model, make).to("cpu")


def bnb_8bit(threshold: float) -> Any:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    def make(old: nn.Linear) -> nn.Module:
        sizes = old.in_features, old.out_features
        has_bias = old.bias is not None
        new = Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False, threshold=threshold)
        new.weight = Int8Params(old.weight.detach().clone(), requires_grad=False)
        new.bias = old.bias
        return new

    return lambda model: _swapped(model, make).to("cpu")


def torchao(name: str) -> Any:
    from torchao import quantization as q

    made = {
        "int8": q.Int8WeightOnlyConfig,
        "int8 dynamic": q.Int8DynamicActivationInt8WeightConfig,
        "float8": q.Float8WeightOnlyConfig,
        "int4": lambda: q.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=q.granularity.PerGroup(32)
        ),
    }[name]()

    def quantise(model: nn.Module) -> nn.Module:
        q.quantize_(model, made, filter_fn=_is_wanted)
        return model

    return quantise


def hqq(bits: int) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def make(old: nn.Linear) -> nn.Module:
        config = BaseQuantizeConfig(nbits=bits, group_size=64)
        return HQQLinear(old, config, compute_dtype=old.weight.dtype, device="cpu")

    return lambda model: _swapped(model, make)


def quanto(name: str) -> Any:
    from optimum import quanto as q

    def quantise(model: nn.Module) -> nn.Module:
        q.quantize(model, weights=getattr(q, name), exclude="lm_head")
        q.freeze(model)
        return model

    return quantise


_MAKERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "nf4": ("bitsandbytes", lambda: bnb_4bit("nf4")),
    "nf4-double": ("bitsandbytes", lambda: bnb_4bit("nf4", double=True)),
    "fp4": ("bitsandbytes", lambda: bnb_4bit("fp4")),
    "int8": ("bitsandbytes", lambda: bnb_8bit(6.0)),
    "int8-plain": ("bitsandbytes", lambda: bnb_8bit(0.0)),
    "ao-int8": ("torchao", lambda: torchao("int8")),
    "ao-int8-dynamic": ("torchao", lambda: torchao("int8 dynamic")),
    "ao-float8": ("torchao", lambda: torchao("float8")),
    "ao-int4": ("torchao", lambda: torchao("int4")),
    "hqq-4": ("hqq", lambda: hqq(4)),
    "quanto-8": ("optimum", lambda: quanto("qint8")),
    "quanto-4": ("optimum", lambda: quanto("qint4")),
}


def quantised(
    name: str, dtype: torch.dtype = torch.float32, layers: int = 2, *, biased: bool = False
) -> Any:
    """A fresh model, the same at every call; skips where its library is not installed."""
    library, make = _MAKERS[name]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    return make()(plain(dtype, layers, biased=biased)).eval()


def quantise(name: str, model: nn.Module) -> Any:
    """A plain model of yours, as the library quantises it."""
    return _MAKERS[name][1]()(model).eval()


ALL = tuple(_MAKERS)
BITSANDBYTES = tuple(name for name in ALL if _MAKERS[name][0] == "bitsandbytes")
WITH_PEFT = tuple(name for name in ALL if not name.startswith("ao-"))
"""PEFT takes a torchao layer only with what transformers' loader leaves behind."""

WITH_GRADIENTS = tuple(name for name in ALL if name != "ao-int8-dynamic")
"""torchao's dynamic int8 product passes no gradient on to its input."""
