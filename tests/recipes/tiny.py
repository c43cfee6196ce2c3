"""Tiny model folders with tokenisers, as `save_pretrained` writes them, and data for them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vera_fx.recipes.recipe import Recipe

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SPECIAL = ["<pad>", "<s>", "</s>", "<end>", "<user>", "<assistant>", "<system>"]


def tokenizer(*, adds: bool = False) -> PreTrainedTokenizerFast:
    """A token for every byte; with ``adds`` texts begin with ``<s>`` and end with ``</s>``."""
    words = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if adds:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=_SPECIAL[3:],
        chat_template=TEMPLATE,
    )


def bert(folder: Path, *, dropout: float = 0.0, layers: int = 2) -> Path:
    """An encoder without a head."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=263,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return saved(BertModel(config), folder, tokenizer(adds=True))


def llama(folder: Path) -> Path:
    """A causal language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=263,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 20  # it stays frozen, and is to be able to say something
    return saved(model, folder, tokenizer())


def vit(folder: Path) -> Path:
    """A vision model with a head for other classes."""
    from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    said = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 8, "width": 8},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    AutoImageProcessor.from_pretrained(folder)
    return folder


def saved(model: Any, folder: Path, tokens: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose class shows in their letters, of different lengths."""
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        label = ("low", "high")[number % 2]
        letters = ("abcd", "wxyz")[number % 2]
        text = "".join(chance.choice(letters + " ") for _ in range(chance.randint(3, 40)))
        rows.append({"text": text, "label": label})
    return rows


def pictures(folder: Path, count: int = 6) -> Path:
    """Dark and bright pictures, a folder for each, and a third kind."""
    from PIL import Image

    chance = random.Random(0)
    for name, level in (("dark", 30), ("bright", 220), ("red", 0)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            value = level + chance.randint(-20, 20)
            colour = (200 + value % 20, 10, 10) if name == "red" else (value,) * 3
            Image.new("RGB", (9, 7), colour).save(folder / name / f"{number}.png")
    return folder


def recipe(**fields: Any) -> Recipe:
    """A recipe for tiny models."""
    known = {"rank": 6, "length": 48, "device": "cpu", "tensorboard": False, "log_every": 1}
    return Recipe.read(None, {**known, **fields})
