"""Classes: their names from the data, losses and figures of classifiers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vera_fx.errors import ConfigError, listing, nearest, shown
from vera_fx.recipes.base_models import HEADS, Base
from vera_fx.recipes.data import Rows

_MOST = 1000
_TOP = 5

FIGURES: Mapping[str, bool] = {"loss": False, "accuracy": True, "f1": True}


def with_label_texts(rows: Rows) -> Rows:
    """Rows whose ``label`` is the name of a class.

    Raises:
        ConfigError: labels are no words, whole numbers or truth values.
    """
    feature = rows.features["label"]
    to_text = getattr(feature, "int2str", None)
    values = rows["label"]
    wrong = next((v for v in values if not isinstance(v, str | int)), None)
    if wrong is not None:
        raise ConfigError(
            f"a label must be a word, a whole number or true or false, got {shown(wrong)}; give "
            "the column that holds the class with --column label=..."
        )
    texts = [to_text(value) if to_text is not None else str(value) for value in values]
    return rows.remove_columns("label").add_column("label", texts)


def classes_of(rows: Rows) -> tuple[str, ...]:
    """The names of the classes, numbers in the order of numbers.

    Raises:
        ConfigError: there is one class alone, or so many that they can hardly be classes.
    """
    found = set(rows["label"])
    if not 1 < len(found) <= _MOST:
        raise ConfigError(
            f"the column 'label' has {len(found)} different values; a classifier takes from 2 to {_MOST}"
        )
    numbers = all(text.lstrip("-").isdecimal() for text in found)
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def indices(labels: Sequence[str], classes: Sequence[str]) -> Tensor:
    """The places of labels among the classes, ``(rows,)``.

    Raises:
        ConfigError: one is no class that was trained.
    """
    places = {name: place for place, name in enumerate(classes)}
    unknown = next((label for label in labels if label not in places), None)
    if unknown is not None:
        raise ConfigError(
            f"the label {unknown!r} is none of the classes in the training data "
            f"({listing(classes)}){nearest(unknown, classes)}"
        )
    return torch.tensor([places[label] for label in labels])


def label_fields(classes: Sequence[str]) -> dict[str, Any]:
    """What a model's configuration says of its classes."""
    names = dict(enumerate(classes))
    return {
        "num_labels": len(classes),
        "id2label": names,
        "label2id": {name: place for place, name in names.items()},
        "problem_type": "single_label_classification",
    }


def heads_of(base: Base) -> tuple[str, ...]:
    """The head of a classifier, and whatever else has no values yet.

    Raises:
        ConfigError: no head was found, so nothing would turn features into classes of this data.
    """
    own = tuple(name for name, _ in base.model.named_children() if name in HEADS)
    if not own and not base.fresh:
        raise ConfigError(
            f"{type(base.model).__name__} has no module called {listing(HEADS)}, and no other that is "
            "new; name its head: options: {modules_to_save: [...]}"
        )
    return tuple(dict.fromkeys((*own, *base.fresh)))


def measured(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the figures are made of, row by row."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return {"loss": losses, "predicted": logits.argmax(-1), "label": labels}


def figures(found: Mapping[str, Tensor], count: int) -> dict[str, float]:
    """Mean loss, accuracy, and F1 as a mean over the classes that occur or are predicted."""
    predicted, labels = found["predicted"], found["label"]
    table = torch.zeros(count, count, dtype=torch.double)
    table.index_put_((labels, predicted), torch.ones(len(labels)).double(), accumulate=True)
    right, both = table.diagonal(), table.sum(0) + table.sum(1)
    f1 = 2 * right[both > 0] / both[both > 0]
    return {
        "loss": found["loss"].double().mean().item(),
        "accuracy": (right.sum() / len(labels)).item(),
        "f1": f1.mean().item(),
    }


def best_classes(logits: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The likeliest class of each row, and the probabilities of the first few."""
    shares, places = logits.float().softmax(-1).topk(min(_TOP, len(classes)))
    return [
        {
            "label": classes[row_places[0]],
            "scores": {
                classes[place]: round(share, 6)
                for place, share in zip(row_places, row, strict=True)
            },
        }
        for row, row_places in zip(shares.tolist(), places.tolist(), strict=True)
    ]
