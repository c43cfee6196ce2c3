"""What the tests of this folder share: a small classifier, examples, jobs, and training one alone."""

import copy
from typing import Any

import torch
from torch import nn

import vera_fx
from vera_fx.training.examples import Order, padding_for


def classifier(*, labels: int = 3) -> nn.Module:
    """A BERT with a head, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        num_labels=labels,
    )
    return BertForSequenceClassification(config)


def causal() -> nn.Module:
    """A Llama with its own head."""
    from tests.models import small_llama

    torch.manual_seed(0)
    return small_llama(30, tie=False)


def examples(count: int, seed: int, *, tokens: bool = False) -> list[dict[str, Any]]:
    """Sequences of 3 to 9 tokens; labels are classes, or the tokens with the first ones masked out."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = 3 + (number * 5 + seed) % 7
        ids = torch.randint(1, 30, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < number % 2 + 1, -100, ids)
        found.append({
            "input_ids": ids,
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": labels if tokens else int(ids.sum()) % 3,
        })  # fmt: skip
    return found


def config(**options: Any) -> vera_fx.VeraConfig:
    fields = {"r": 5, "target_modules": ["query", "value"], "d_initial": 0.4, **options}
    return vera_fx.VeraConfig(**fields)


def schedule_of(optimizer: Any, settings: vera_fx.TrainSettings) -> Any:
    """transformers' own."""
    import transformers

    if settings.schedule == "constant":
        return transformers.get_constant_schedule_with_warmup(optimizer, settings.warmup)
    make = getattr(transformers, f"get_{settings.schedule}_schedule_with_warmup")
    return make(optimizer, settings.warmup, settings.steps)


def train_alone(
    base: nn.Module, config: vera_fx.VeraConfig, data: Any, settings: vera_fx.TrainSettings
) -> dict[str, torch.Tensor]:
    """One adapter, by ``torch.optim.AdamW`` and the model's own loss; what it trained, by name."""
    model = vera_fx.adapt(copy.deepcopy(base), config).train()
    vectors, copies = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.vera.adapter("default").named_parameters():
        (copies if name.startswith("copies") else vectors).append(parameter)
    rate = settings.lr if settings.copies_lr is None else settings.copies_lr
    groups = [{"params": vectors}, {"params": copies, "lr": rate}]
    options = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(groups[: 1 + bool(copies)], lr=settings.lr, **options)
    schedule, order = schedule_of(optimizer, settings), Order(settings, len(data))
    collate = padding_for(0)
    for step in range(settings.steps):
        model(**collate([data[at] for at in order.at(step)])).loss.backward()
        if settings.max_norm:
            nn.utils.clip_grad_norm_(vectors + copies, settings.max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return trained(model, "default")


def trained(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Everything that an adapter trains, copied."""
    return {n: p.detach().clone() for n, p in model.vera.adapter(name).named_parameters()}


def assert_trained_alike(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, bound: float = 2e-3
) -> None:
    """Element by element. AdamW's first steps divide tiny gradients by themselves: rounding grows there."""
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item()
        assert error <= bound * max(value.abs().max().item(), 1e-2), f"{name}: {error}"
