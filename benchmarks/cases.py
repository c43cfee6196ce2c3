"""The models and shapes that are measured; random weights, built from configurations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One training case.

    Attributes:
        name: how tables call it.
        family: ``roberta``, ``llama`` or ``vit``.
        targets: target_modules for every method.
        r: VeRA's rank.
        layers: number of layers.
        batch: sequences per step.
        length: tokens per sequence.
        dtype: of the base model.
        checkpointed: transformers' gradient checkpointing is on.
        device: where model and inputs are.
        quantised: how the base's linear layers are stored: ``"nf4"`` or ``"int8"`` (bitsandbytes).
    """

    name: str
    family: str
    targets: tuple[str, ...] | str
    r: int
    layers: int
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    checkpointed: bool = False
    device: str = "cpu"
    quantised: str = ""

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.length


def case_of(values: dict[str, Any]) -> Case:
    """A case from JSON."""
    targets = values["targets"]
    values["targets"] = targets if isinstance(targets, str) else tuple(targets)
    values["dtype"] = getattr(torch, values["dtype"])
    return Case(**values)


BF16 = torch.bfloat16
QV = {"roberta": ("query", "value"), "llama": ("q_proj", "v_proj"), "vit": ("q_proj", "v_proj")}


def roberta(case: Case) -> nn.Module:
    """RoBERTa-base's shape without its vocabulary."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=1000,
        num_hidden_layers=case.layers,
        max_position_embeddings=case.length + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return RobertaModel(config, add_pooling_layer=False)


def llama(case: Case) -> nn.Module:
    """Llama's architecture at hidden size 768."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=case.layers,
        num_attention_heads=12,
        use_cache=False,
    )
    return LlamaModel(config)


def vit(case: Case) -> nn.Module:
    """ViT-base's encoder; the length of a case counts its patches."""
    from transformers import ViTConfig, ViTModel

    side = 16 * round(case.length**0.5)
    config = ViTConfig(num_hidden_layers=case.layers, image_size=side, patch_size=16)
    return ViTModel(config, add_pooling_layer=False)


BUILDERS: dict[str, Callable[[Case], nn.Module]] = {"roberta": roberta, "llama": llama, "vit": vit}


def build(case: Case) -> nn.Module:
    """The base model in train mode, the same weights every time."""
    torch.manual_seed(0)
    model = BUILDERS[case.family](case).to(case.dtype)
    model = (quantise(model, case.quantised) if case.quantised else model).to(case.device).train()
    if case.checkpointed:
        model.gradient_checkpointing_enable()
    return model


def quantise(model: nn.Module, kind: str) -> nn.Module:
    """The model over weights of bitsandbytes; a layer is quantised when it is moved."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for path, old in list(model.named_modules()):
        if not isinstance(old, nn.Linear):
            continue
        sizes, biased, weight = (
            (old.in_features, old.out_features),
            old.bias is not None,
            old.weight,
        )
        if kind == "nf4":
            new: nn.Module = Linear4bit(*sizes, biased, compute_dtype=weight.dtype)
            new.weight = Params4bit(weight.detach(), False, quant_type="nf4", module=new)
            # For all methods: packed weights give no gradients, and compiled calls of PEFT fail on them.
            new.support_avx512bf16_for_cpu = False
        else:
            new = Linear8bitLt(*sizes, biased, has_fp16_weights=False)
            new.weight = Int8Params(weight.detach(), requires_grad=False)
        new.bias = old.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    return model


def inputs(case: Case) -> dict[str, Any]:
    """Arguments of one call; the tensor that every method must give a gradient for is marked."""
    torch.manual_seed(1)
    if case.family == "vit":
        side = 16 * round(case.length**0.5)
        pixels = torch.randn(case.batch, 3, side, side, dtype=case.dtype)
        return {"pixel_values": pixels.to(case.device).requires_grad_()}
    embeds = torch.randn(case.batch, case.length, 768, dtype=case.dtype)
    embeds = embeds.to(case.device).requires_grad_()
    return {"inputs_embeds": embeds, "attention_mask": _mask(case).to(case.device)}


def _mask(case: Case) -> Tensor:
    mask = torch.ones(case.batch, case.length, dtype=torch.long)
    mask[0, -3:] = 0
    return mask


def grid(*, full: bool) -> list[Case]:
    """The cases of a run; the short list keeps to two layers."""
    cases = [
        Case("roberta q,v r=1024", "roberta", QV["roberta"], 1024, 2, 16, 128),
        Case("roberta q,v r=256", "roberta", QV["roberta"], 256, 2, 16, 128),
        Case("llama all r=256", "llama", "all-linear", 256, 2, 16, 128),
        Case("roberta q,v r=1024 bf16", "roberta", QV["roberta"], 1024, 2, 16, 128, BF16),
        Case("llama all r=256 bf16", "llama", "all-linear", 256, 2, 16, 128, BF16),
    ]
    if full:
        cases += [
            Case("roberta q,v r=256 T=256", "roberta", QV["roberta"], 256, 2, 2, 128),
            Case("llama all r=256 T=256", "llama", "all-linear", 256, 2, 2, 128),
            Case("llama all r=256 T=512", "llama", "all-linear", 256, 2, 4, 128),
            Case("roberta q,v r=1024 T=8192", "roberta", QV["roberta"], 1024, 2, 64, 128),
            Case("llama all r=256 T=8192", "llama", "all-linear", 256, 2, 64, 128),
            Case("vit q,v r=256", "vit", QV["vit"], 256, 2, 8, 196),
            Case("roberta q,v r=1024 12 layers", "roberta", QV["roberta"], 1024, 12, 16, 128),
            Case("llama all r=256 12 layers", "llama", "all-linear", 256, 12, 4, 128),
            Case("llama all r=256 bf16 T=512", "llama", "all-linear", 256, 2, 4, 128, BF16),
            Case("llama all r=256 bf16 T=8192", "llama", "all-linear", 256, 2, 64, 128, BF16),
            Case("roberta q,v r=256 bf16", "roberta", QV["roberta"], 256, 2, 16, 128, BF16),
        ]
    return cases


def narrow_roberta(layers: int, **fields: Any) -> nn.Module:
    """RoBERTa at hidden size 64 and four heads: layers that cost little but their calls."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=100,
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=layers,
        **fields,
    )
    return RobertaModel(config, add_pooling_layer=False)
