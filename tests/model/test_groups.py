"""Groups of parameters: every one that trains stands in exactly one, with its own rate and decay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import vera_fx
from tests.helpers import fill_vectors


def classifier() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40, intermediate_size=20, num_labels=3, hidden_dropout_prob=0.0, **sizes
        )
    )


def adapted(kind: type = vera_fx.VeraConfig, **fields: Any) -> nn.Module:
    return vera_fx.adapt(classifier(), kind(**{"r": 5, "task_type": "SEQ_CLS", **fields}))


def names(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    by_id = {id(p): n for n, p in model.named_parameters()}
    found = [by_id[id(p)] for group in groups for p in group["params"]]
    assert len(found) == len(set(found)), "a parameter stands twice"
    return {group["name"]: {by_id[id(p)] for p in group["params"]} for group in groups}


def trains(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [vera_fx.VeraConfig, vera_fx.DVoraConfig])
def test_vectors_heads_and_their_biases(kind: type) -> None:
    model = adapted(kind)
    groups = vera_fx.parameter_groups(
        model, lr=0.3, head_lr=0.2, weight_decay=0.01, head_weight_decay=0.1
    )
    found = names(model, groups)
    assert set.union(*found.values()) == trains(model)
    assert found["vectors"] == {n for n in trains(model) if ".vectors." in n}
    assert len(found["vectors"]) == 2 * 2 * (2 if kind is vera_fx.VeraConfig else 3)
    head = "vera.adapters.default.copies.classifier."
    assert found["heads"] == {f"{head}weight"}
    assert found["biases"] == {f"{head}bias"}
    values = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert values == {"vectors": (0.3, 0.01), "heads": (0.2, 0.1), "biases": (0.2, 0.0)}


def test_only_what_trains_now() -> None:
    model = adapted()
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=3, target_modules=["query"]))
    assert all(
        ".default." in n
        for part in names(model, vera_fx.parameter_groups(model)).values()
        for n in part
    )
    vera_fx.set_adapter(model, "other")
    found = names(model, vera_fx.parameter_groups(model))
    assert set(found) == {"vectors"}
    assert len(found["vectors"]) == 4
    assert all(".other." in name for name in found["vectors"])


def test_base_parameters_that_the_caller_trains_are_not_lost() -> None:
    model = adapted(bias="vera_only")
    norm = model.get_submodule("bert.encoder.layer.1.output.LayerNorm")
    norm.requires_grad_(requires_grad=True)
    found = names(model, vera_fx.parameter_groups(model))
    assert {"bert.encoder.layer.1.output.LayerNorm.weight"} < found["biases"]
    assert sum("copies" in n and n.endswith("query.bias") for n in found["biases"]) == 2
    assert set.union(*found.values()) == trains(model)


def test_wrapped_models() -> None:
    model = adapted()
    wrapped = vera_fx.parameter_groups(torch.compile(model))
    assert names(model, wrapped) == names(model, vera_fx.parameter_groups(model))


def test_each_group_moves_by_its_own_rate_and_decay() -> None:
    """One SGD step: gradients of one, so that p becomes ``p - lr (1 + decay p)``."""
    model = adapted()
    fill_vectors(model)
    rates = {"lr": 0.5, "head_lr": 0.25, "weight_decay": 0.5, "head_weight_decay": 0.125}
    groups = vera_fx.parameter_groups(model, **rates)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    torch.optim.SGD(groups, lr=9.0).step()
    for name, p in model.named_parameters():
        rate, decay = (0.5, 0.5) if ".vectors." in name else (0.25, 0.125)
        decay = 0.0 if name.endswith("classifier.bias") and "copies" in name else decay
        old = before[name]
        wanted = old - rate * (1 + decay * old) if p.requires_grad else old
        torch.testing.assert_close(p, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("field", ["lr", "head_lr", "weight_decay", "head_weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), "fast"])
def test_rates_that_cannot_be_used(field: str, value: Any) -> None:
    with pytest.raises(vera_fx.ConfigError, match=field):
        vera_fx.parameter_groups(adapted(), **{field: value})


def test_models_without_anything_to_train() -> None:
    with pytest.raises(vera_fx.AdapterError, match="not adapted|adapt"):
        vera_fx.parameter_groups(classifier())
    model = adapted()
    vera_fx.set_trainable(model, "default", trainable=False)
    with pytest.raises(vera_fx.AdapterError, match="set_trainable"):
        vera_fx.parameter_groups(model)


def test_trainer_takes_them(tmp_path: Path) -> None:
    """Trainer's own schedule lowers every group from its own rate."""
    model = adapted()
    ids = torch.randint(3, 40, (8, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": torch.tensor(at % 3)} for at, row in enumerate(ids)]
    optimizer = torch.optim.AdamW(vera_fx.parameter_groups(model, lr=4e-2, head_lr=1e-2))
    options: Any = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1.0, **options
    )
    seen: list[list[float]] = []
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))  # type: ignore[arg-type]
    optimizer.register_step_post_hook(
        lambda opt, *_: seen.append([g["lr"] for g in opt.param_groups])
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert seen[0] == [4e-2, 1e-2, 1e-2]
    assert seen[2] == pytest.approx([2e-2, 5e-3, 5e-3])
    moved = [
        n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])
    ]
    assert set(moved) == set(before)
