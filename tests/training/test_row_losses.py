"""Losses by row: each adapter's is what the model itself says of its rows alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close
from tests.training.jobs import causal, classifier, config, examples
from vera_fx.training.examples import padding_for

NAMES = ["a", "b", "a", "__base__", "b", "b"]


def labels_for(kind: str, batch: dict[str, Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    floats = torch.rand(6, 3, generator=generator)
    return {
        "regression": floats,
        "multilabel": (floats > 0.5).float(),
        "tokens": batch["labels"].clamp(max=2),
    }.get(kind, batch["labels"])


def model_for(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with such a loss, and a padded batch of six rows with labels."""
    from transformers import BertForTokenClassification

    model: Any = causal() if kind == "causal" else classifier()
    if kind == "tokens":
        model = BertForTokenClassification(model.config)
    if kind in {"regression", "multilabel"}:
        model.config.problem_type = kind.replace("multilabel", "multi_label_classification")
    targets = ["q_proj", "v_proj"] if kind == "causal" else ["query", "value"]
    vera_fx.adapt(model.eval(), config(target_modules=targets), adapter_name="a")
    vera_fx.add_adapter(model, "b")
    for number, parameter in enumerate(model.vera.adapters.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    batch = padding_for(0)(examples(6, 1, tokens=kind in {"causal", "tokens"}))
    return model, {**batch, "labels": labels_for(kind, batch)}


@pytest.mark.parametrize("kind", ["causal", "tokens", "classes", "regression", "multilabel"])
def test_each_adapters_loss_is_the_models_own_on_its_rows(kind: str) -> None:
    model, batch = model_for(kind)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**inputs, adapter_names=NAMES).logits
        found = vera_fx.row_losses(model, logits, batch["labels"])
        losses = found.by_adapter(NAMES)
        assert list(losses) == ["a", "b", "__base__"]
        for name, loss in losses.items():
            rows = [row for row, other in enumerate(NAMES) if other == name]
            mine = {key: value[rows] for key, value in batch.items()}
            expected = model(**mine, adapter_names=[name] * len(rows)).loss
            assert_close(loss, expected, factor=10, what=name)
            for row in rows:
                own = {key: value[[row]] for key, value in batch.items()}
                assert_close(found.means[row], model(**own, adapter_names=[name]).loss, factor=10)
    assert_close(found.total(NAMES), sum(losses.values(), torch.tensor(0.0)))
    if kind in {"causal", "tokens"}:
        assert found.counts.tolist() != [found.counts[0].item()] * 6


def test_a_row_without_labels_has_no_loss_and_no_gradient() -> None:
    model, batch = model_for("causal")
    labels = batch["labels"].clone()
    labels[2] = -100
    logits = torch.randn(*labels.shape, 30, requires_grad=True)
    found = vera_fx.row_losses(model, logits, labels)
    found.means.sum().backward()
    assert found.means[2] == 0
    assert found.means[[0, 1, 3]].min() > 0
    assert not logits.grad[2].any()
    assert logits.grad[1].any()


def test_what_cannot_be_told_or_does_not_fit() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(vera_fx.ConfigError, match="cannot be told.*give row_losses.*'causal'"):
        vera_fx.row_losses(nn.Linear(2, 2), logits, labels)
    with pytest.raises(vera_fx.ConfigError, match="kind must be one of.*did you mean 'classes'"):
        vera_fx.row_losses(nn.Linear(2, 2), logits, labels, kind="class")
    for kind, wrong in (("classes", labels[:2]), ("causal", labels), ("multilabel", labels)):
        with pytest.raises(vera_fx.ConfigError, match=rf"of the kind '{kind}' takes.*got \[3, 4\]"):
            vera_fx.row_losses(nn.Linear(2, 2), logits, wrong, kind=kind)
    found = vera_fx.row_losses(nn.Linear(2, 2), logits, labels, kind="classes")
    with pytest.raises(vera_fx.ConfigError, match="2 adapter_names.*3 rows"):
        found.by_adapter(["a", "b"])
