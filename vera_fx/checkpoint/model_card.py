"""The model card of a saved adapter: what the Hub and people read first."""

import json
from collections.abc import Iterator
from typing import Any

from torch import nn

from vera_fx.bank.adapter import Adapter
from vera_fx.base.hf import base_model_name, is_pretrained
from vera_fx.checkpoint.peft_config import PEFT_VERSION

CARD_FILE = "README.md"


def card(model: nn.Module, adapter: Adapter) -> str:
    """A card with the fields that PEFT fills in, and what there is to know of the adapter."""
    lines = ["---", *_front_matter(model, adapter), "---", "", *_text(model, adapter)]
    return "\n".join(lines) + "\n"


def _front_matter(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """Lines of YAML; every value is JSON, which YAML includes."""
    base, tags = base_model_name(model), list[str]()
    if base is not None:
        tags.append(f"base_model:adapter:{base}")
    if is_pretrained(model):
        tags.append("transformers")
    values: dict[str, Any] = {"base_model": base, "library_name": "peft", "tags": tags or None}
    if adapter.config.task_type == "CAUSAL_LM":
        values["pipeline_tag"] = "text-generation"
    for name, value in values.items():
        if value is not None:
            yield f"{name}: {json.dumps(value)}"


def _text(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    config, base = adapter.config, base_model_name(model)
    trained = sum(p.numel() for p in adapter.parameters())
    kind = adapter.kind
    yield f"# {kind.name} adapter"
    yield ""
    yield f"An adapter for `{base or type(model).__name__}`, trained by {kind.name} ([{kind.paper}])."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| rank | {config.r} |"
    yield f"| adapted modules | {len(adapter.vectors.by_path)} |"
    yield f"| trained numbers | {trained:,} |"
    if config.saved_modules:
        yield f"| modules trained in full | {', '.join(config.saved_modules)} |"
    yield ""
    peft = (
        f"not with PEFT: {kind.not_peft}"
        if kind.not_peft
        else "and with PEFT (`PeftModel.from_pretrained`)"
    )
    yield f"Loads with vera_fx (`vera_fx.load_adapter`) {peft}."
    yield ""
    yield "### Framework versions"
    yield ""
    yield f"- PEFT {PEFT_VERSION}"
    yield ""
    yield "[arXiv 2310.11454]: https://arxiv.org/abs/2310.11454"
