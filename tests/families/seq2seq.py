"""Encoder-decoder models, two layers on either side."""

import torch
from torch import Tensor

from tests.families.member import Member, known, of_transformers
from tests.models import text_inputs, tokens

SIZES = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 3,
    "init_std": 0.3,
}


def speech() -> dict[str, Tensor]:
    features = torch.randn(3, 6, 24, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "labels": tokens()}


SEQ2SEQ: tuple[Member, ...] = (
    known("t5"),
    of_transformers(
        "bart",
        "Bart",
        "ForConditionalGeneration",
        text_inputs,
        **SIZES,
        max_position_embeddings=64,
        forced_eos_token_id=None,
    ),
    of_transformers(
        "whisper",
        "Whisper",
        "ForConditionalGeneration",
        speech,
        ["q_proj", "v_proj"],
        **SIZES,
        num_mel_bins=6,
        max_source_positions=12,
        max_target_positions=32,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    ),
)
