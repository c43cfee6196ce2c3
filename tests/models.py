"""Tiny models of many families, built from configurations: random weights, no download."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 97


class MLP(nn.Module):
    """Two linear layers of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 7)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.drop(torch.tanh(self.lin0(x))))


class Attention(nn.Module):
    """Plain attention: three sites read one input."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        flat = mixed.transpose(-2, -3).flatten(-2)
        return self.out(flat), flat


@dataclass(frozen=True)
class Family:
    """One architecture: how to build it, how to call it, what to target."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    generates: bool = False


def tokens(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))


def text_inputs(*, labels: bool = True) -> dict[str, Any]:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, **({"labels": ids} if labels else {})}


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def small_llama(vocabulary: int, *, tie: bool) -> nn.Module:
    """A Llama of one layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config)


def mistral(layers: int, window: int | None) -> nn.Module:
    """With a sliding window of so many tokens, or none."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    return MistralForCausalLM(config)


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def _classes() -> Tensor:
    return torch.tensor([0, 1, 1])


FAMILIES = (
    Family(
        "mlp",
        MLP,
        lambda: {"x": torch.randn(5, 10, generator=torch.Generator().manual_seed(1))},
        {"target_modules": ["lin0", "lin1"]},
    ),
    Family(
        "attention",
        Attention,
        lambda: {"x": torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))},
        {"target_modules": ["query", "value", "out"]},
    ),
    Family("opt", opt, text_inputs, generates=True),
    Family("llama", llama, text_inputs, {"target_modules": "all-linear"}, generates=True),
    Family("gpt2", gpt2, text_inputs, {"target_modules": ["c_attn", "c_proj"]}, generates=True),
    Family(
        "bert",
        bert,
        lambda: {**text_inputs(labels=False), "labels": _classes()},
        {"task_type": "SEQ_CLS"},
    ),
    Family("t5", t5, text_inputs, {"target_modules": ["q", "v", "wo"]}, generates=True),
    Family(
        "vit",
        vit,
        lambda: {
            "pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
            "labels": torch.tensor([0, 1, 2]),
        },
        {"target_modules": "all-linear"},
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}


def params(
    *fast: str, among: Iterable[Family] = FAMILIES, value: Callable[[Family], Any] = lambda f: f
) -> list[Any]:
    """Families as parameters of a test: those named here, and the rest in ``make test-all`` only."""
    slow = pytest.mark.slow
    return [pytest.param(value(f), id=f.name, marks=() if f.name in fast else slow) for f in among]


def param_names(*fast: str, among: Iterable[Family] = FAMILIES) -> list[Any]:
    """The same by name."""
    return params(*fast, among=among, value=lambda family: family.name)
