"""The losses of Hugging Face's heads, row by row, so that each adapter's is a mean over its own tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vera_fx.base.modules import original_class
from vera_fx.config import check_choice
from vera_fx.errors import ConfigError

IGNORED = -100
"""The label of positions that count for nothing, as in Hugging Face's losses."""

KINDS = ("causal", "tokens", "classes", "regression", "multilabel")
_BY_LOSS = {"ForCausalLM": "causal", "ForMaskedLM": "tokens", "ForTokenClassification": "tokens"}


@dataclass(frozen=True, slots=True)
class RowLosses:
    """What `row_losses` found.

    Attributes:
        sums: ``(rows,)``, float32: the sum over each row's tokens (labels, values) that count.
        counts: ``(rows,)``: how many these are.
    """

    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """``(rows,)``: each row's own mean; 0 for a row without labels."""
        return self.sums / self.counts.clamp(min=1)

    def by_adapter(self, adapter_names: Sequence[str]) -> dict[str, Tensor]:
        """Each adapter's loss: the mean over the tokens of all its rows, as if it were alone.

        Args:
            adapter_names: one per row, as the model was called with.

        Raises:
            ConfigError: there are more or fewer names than rows.
        """
        if len(adapter_names) != len(self.sums):
            raise ConfigError(
                f"{len(adapter_names)} adapter_names were given for the losses of {len(self.sums)} rows"
            )
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(adapter_names):
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            index = torch.tensor(rows, device=self.sums.device)
            found[name] = self.sums[index].sum() / self.counts[index].sum().clamp(min=1)
        return found

    def total(self, adapter_names: Sequence[str]) -> Tensor:
        """The sum of the adapters' losses: its backward gives each adapter the gradient of its own."""
        return torch.stack(list(self.by_adapter(adapter_names).values())).sum()


def row_losses(
    model: nn.Module, logits: Tensor, labels: Tensor, *, kind: str | None = None
) -> RowLosses:
    """The loss of every row of a batch, in float32, as the model's own ``loss`` would count it.

    Call the model without ``labels``, which would give one mean over all rows::

        names = ["movies", "phones", "movies"]
        logits = model(**inputs, adapter_names=names).logits
        vera_fx.row_losses(model, logits, labels).total(names).backward()

    Args:
        model: whose head made the logits; says the kind of loss where none is given.
        logits: ``(rows, classes)`` or ``(rows, tokens, classes)``.
        labels: ``(rows,)``, ``(rows, tokens)`` or, as floats, ``(rows, classes)``. -100 counts for
            nothing where labels are classes or tokens.
        kind: ``"causal"`` (each token's logits are for the next), ``"tokens"`` (for itself: masked
            language models, token classification, decoders that are given shifted inputs),
            ``"classes"``, ``"regression"`` or ``"multilabel"``. None takes it from the model's class.

    Raises:
        ConfigError: the kind is unknown or cannot be told, or sizes do not fit it.
    """
    kind = kind or kind_of_loss(model, labels)
    check_choice("kind", kind, KINDS)
    _check_sizes(kind, logits, labels)
    labels = labels.to(logits.device)
    if kind in {"regression", "multilabel"}:
        return _values(kind, logits.float(), labels.float())
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    if kind == "classes":
        logits, labels = logits.unsqueeze(1), labels.reshape(-1, 1)
    each = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return RowLosses(each.view(labels.shape).sum(1), (labels != IGNORED).sum(1))


def label_counts(kind: str, labels: Tensor) -> Tensor:
    """``(rows,)``: how many tokens of each row count, without any logits."""
    if kind in {"regression", "multilabel"}:
        return torch.full((len(labels),), labels[0].numel())
    counted = (labels[:, 1:] if kind == "causal" else labels.reshape(len(labels), -1)) != IGNORED
    return counted.sum(1)


def kind_of_loss(model: nn.Module, labels: Tensor) -> str:
    """The kind of a Hugging Face model's loss, by its class and configuration.

    Raises:
        ConfigError: it cannot be told.
    """
    model = getattr(model, "_orig_mod", model)
    name = getattr(model, "loss_type", None)
    if name in _BY_LOSS:
        return _BY_LOSS[name]
    if name in {"ForSequenceClassification", "ForImageClassification"}:
        return _kind_of_classes(model, labels)
    raise ConfigError(
        f"which loss {original_class(model).__name__} has cannot be told from its class; give row_losses "
        f"(or train_many) a kind: one of {', '.join(map(repr, KINDS))}"
    )


def _kind_of_classes(model: nn.Module, labels: Tensor) -> str:
    config = model.config
    known = {"single_label_classification": "classes", "multi_label_classification": "multilabel"}
    asked = getattr(config, "problem_type", None)
    if asked is not None:
        return known.get(str(asked), str(asked))
    if getattr(config, "num_labels", 2) == 1:
        return "regression"
    return "multilabel" if labels.is_floating_point() else "classes"


def _check_sizes(kind: str, logits: Tensor, labels: Tensor) -> None:
    expected = {
        "causal": logits.shape[:-1],
        "tokens": logits.shape[:-1],
        "classes": logits.shape[:1],
        "regression": logits.shape,
        "multilabel": logits.shape,
    }[kind]
    tokenwise = kind in {"causal", "tokens"}
    flat = kind == "regression" and labels.numel() == logits.numel()
    fits = logits.ndim == 2 + tokenwise and (flat or labels.shape == expected)
    if not fits or logits.shape[:1] != labels.shape[:1]:
        raise ConfigError(
            f"a loss of the kind {kind!r} takes logits (rows, {'tokens, ' if tokenwise else ''}classes) and "
            f"labels to match, got {list(logits.shape)} and {list(labels.shape)}"
        )


def _values(kind: str, logits: Tensor, labels: Tensor) -> RowLosses:
    labels = labels.reshape(logits.shape)
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    each = loss(logits, labels, reduction="none").flatten(1)
    counts = torch.full((len(each),), each.shape[1], device=each.device)
    return RowLosses(each.sum(1), counts)
