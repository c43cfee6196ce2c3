"""Models that look at pictures."""

import torch
from torch import Tensor, nn

from tests.families.member import Member, known
from tests.models import text_inputs


def pictures() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_factor": 10.0,
    }
    text = {
        **sizes,
        "vocab_size": 97,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))


def timm() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=3
    )


VISION: tuple[Member, ...] = (
    known("vit"),
    Member(
        "clip",
        clip,
        lambda: {**text_inputs(labels=False), "pixel_values": pictures(), "return_loss": True},
        {"target_modules": ["q_proj", "v_proj"]},
        # The logits compare every text with every picture; the embeddings are of one row each.
        output=lambda result: torch.cat([result.text_embeds, result.image_embeds], -1),
    ),
    Member(
        "timm-vit", timm, lambda: {"x": pictures()}, {"target_modules": ["qkv", "attn.proj", "fc1"]}
    ),
)
