"""A run ends in the numbers of a loop written by hand over PEFT's model: losses, rates, masks, heads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    set_seed,
)

from tests.helpers import adapter_vectors, assert_close, assert_far_apart
from tests.recipes import tiny
from vera_fx.recipes.train import train

STEPS, RATE, HEAD_RATE = 3, 0.05, 0.02
SETTINGS = {
    "held_out": 0,
    "steps": STEPS,
    "rate": RATE,
    "head_rate": HEAD_RATE,
    "schedule": "constant",
    "warmup": 0,
    "plan": "factored",
}


def by_hand(base: nn.Module, loss: Callable[[nn.Module], Tensor], **fields: Any) -> nn.Module:
    """PEFT's VeRA over a model, trained on all rows in every step."""
    model = peft.get_peft_model(base, peft.VeraConfig(r=6, **fields))
    model.train()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    vectors = [p for n, p in named if "vera_lambda" in n]
    others = [p for n, p in named if "vera_lambda" not in n]
    groups = [{"params": vectors, "lr": RATE}, {"params": others, "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_([*vectors, *others], 1.0)
        optimizer.step()
    return model


def assert_same(base: nn.Module, folder: Path, expected: nn.Module) -> None:
    """The run's adapter, as PEFT reads it, has the expected vectors and heads."""
    found = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    ours = {n: p for n, p in found.named_parameters() if p.requires_grad}
    theirs = {n: p for n, p in expected.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_close(ours[name], value, factor=20, what=name)
    for (_, _, vector), value in adapter_vectors(found).items():
        assert_far_apart(value, torch.full_like(value, {"d": 0.1, "b": 0.0}[vector]))


def test_classification(tmp_path: Path) -> None:
    model = tiny.bert(tmp_path / "model", layers=1)
    rows = tiny.sentences(12)
    data = tiny.jsonl(tmp_path / "data.jsonl", rows)
    recipe = tiny.recipe(task="classification", model=model, data=data, batch_size=12, **SETTINGS)
    train(recipe, tmp_path / "run")

    def base() -> nn.Module:
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)

    words = tiny.tokenizer(adds=True)
    batch = words([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([["high", "low"].index(row["label"]) for row in rows])
    assert batch["input_ids"].shape[1] < 48, "nothing was cut"
    expected = by_hand(
        base(), lambda m: F.cross_entropy(m(**batch).logits, labels), task_type="SEQ_CLS"
    )
    assert_same(base(), tmp_path / "run", expected)


def test_prompts_are_not_learned_and_tokens_weigh_the_same(tmp_path: Path) -> None:
    """Two batches of different numbers of tokens make a step."""
    model = tiny.llama(tmp_path / "model")
    rows = [
        {"prompt": row["text"], "completion": row["label"] * (1 + number % 3)}
        for number, row in enumerate(tiny.sentences(10))
    ]
    data = tiny.jsonl(tmp_path / "data.jsonl", rows)
    recipe = tiny.recipe(
        task="causal-lm", model=model, data=data, batch_size=5, accumulate=2, **SETTINGS
    )
    train(recipe, tmp_path / "run")

    def base() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(model)

    words = tiny.tokenizer()

    def loss(adapted: nn.Module) -> Tensor:
        losses: list[Tensor] = []
        for row in rows:
            prompt, answer = (words(row[key])["input_ids"] for key in ("prompt", "completion"))
            ids = torch.tensor([[*prompt, *answer, words.eos_token_id]])
            logits = adapted(ids).logits[0, len(prompt) - 1 : -1]
            losses.append(F.cross_entropy(logits, ids[0, len(prompt) :], reduction="none"))
        return torch.cat(losses).mean()

    assert_same(base(), tmp_path / "run", by_hand(base(), loss, task_type="CAUSAL_LM"))


def test_embeddings(tmp_path: Path) -> None:
    model = tiny.bert(tmp_path / "model", layers=1)
    texts = [row["text"] for row in tiny.sentences(16)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    data = tiny.jsonl(tmp_path / "data.jsonl", [{"anchor": a, "positive": p} for a, p in pairs])
    recipe = tiny.recipe(
        task="embeddings", model=model, data=data, batch_size=8, temperature=0.2, **SETTINGS
    )
    train(recipe, tmp_path / "run")

    words = tiny.tokenizer(adds=True)

    def embed(adapted: nn.Module, text: str) -> Tensor:
        states = adapted(**words(text, return_tensors="pt")).last_hidden_state[0]
        return states.mean(0) / states.mean(0).norm()

    def loss(adapted: nn.Module) -> Tensor:
        anchors = torch.stack([embed(adapted, anchor) for anchor, _ in pairs])
        positives = torch.stack([embed(adapted, positive) for _, positive in pairs])
        return F.cross_entropy(anchors @ positives.T / 0.2, torch.arange(8))

    expected = by_hand(AutoModel.from_pretrained(model), loss, task_type="FEATURE_EXTRACTION")
    assert_same(AutoModel.from_pretrained(model), tmp_path / "run", expected)
