"""A classifier and an embedder with adapters far apart, and what each says in process, one text at a time."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

import vera_fx
from tests.helpers import fill_vectors
from tests.recipes import tiny

LABELS = ("bad", "fair", "good")
TEXTS = ("a fine film", "dull, and much too long for what it says", "?")


def classifier(root: Path, adapters: int) -> Path:
    """``model`` and ``store`` with adapters ``a0``, ``a1``, ..."""
    torch.manual_seed(0)
    BertForSequenceClassification(_config(id2label=dict(enumerate(LABELS)))).save_pretrained(
        root / "model"
    )
    return _with_adapters(root, AutoModelForSequenceClassification, adapters)


def embedder(root: Path, adapters: int) -> Path:
    """``model`` and ``store`` with adapters ``a0``, ``a1``, ..."""
    torch.manual_seed(1)
    BertModel(_config()).save_pretrained(root / "model")
    return _with_adapters(root, AutoModel, adapters)


def _config(**more: Any) -> BertConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}
    bounds = {"vocab_size": 263, "max_position_embeddings": 64, "initializer_range": 0.4}
    return BertConfig(num_hidden_layers=2, **sizes, **bounds, **more)


def _with_adapters(root: Path, kind: Any, count: int) -> Path:
    tiny.tokenizer(adds=True).save_pretrained(root / "model")
    for number in range(count):
        save(root, kind, f"a{number}", 0.5 + number)
    return root


def save(root: Path, kind: Any, name: str, scale: float) -> None:
    """An adapter in the store, whole from its first moment there or in the place of another."""
    model = kind.from_pretrained(root / "model").eval()
    vera = vera_fx.VeraConfig(r=6, target_modules=["query", "intermediate.dense"])
    adapted = vera_fx.adapt(model, vera)
    fill_vectors(adapted, scale)
    vera_fx.save_adapter(adapted, root / "store" / name)


def scores(root: Path, name: str, text: str) -> list[float]:
    """What a classifier says, with one adapter that was loaded for it."""
    logits = _alone(root, AutoModelForSequenceClassification, name, text).logits
    return logits.softmax(-1)[0].tolist()


def vector(root: Path, name: str, text: str) -> list[float]:
    """What an embedder says: the mean of the tokens, of length 1."""
    state = _alone(root, AutoModel, name, text).last_hidden_state[0].mean(0)
    return (state / state.norm()).tolist()


def _alone(root: Path, kind: Any, name: str, text: str) -> Any:
    model = kind.from_pretrained(root / "model").eval()
    vera_fx.load_adapter(model, root / "store" / name)
    batch = AutoTokenizer.from_pretrained(root / "model")(text, return_tensors="pt")
    with torch.no_grad():
        return model(**batch)
