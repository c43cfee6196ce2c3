"""Images: a small ViT, trained from scratch on the digits 0 to 4, is adapted to 5 to 9 by few examples.

scikit-learn's digits: 1,797 images of 8 by 8. No pretrained vision model comes with a package, so the base is
made here: what it shows is whether adapters move a real ViT to classes that it has not seen, no more.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.quality.tasks import NO_DROPOUT, Example, Task, collated

SHOTS, VALIDATION = 10, 200
"""Images of each class to train on, as in the paper's table 5, and images that decide rates."""

SIZES = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 5, **NO_DROPOUT,
}  # fmt: skip
EPOCHS, RATE, BATCH = 25, 2e-3, 32
"""Of the base's own training."""

CACHE = Path("out/quality/vit.pt")


def images(classes: range) -> list[Example]:
    """Images of these digits in a fixed random order; labels count from 0."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    rows = [
        {"pixel_values": image, "labels": int(label) - classes.start}
        for image, label in zip(pixels, found.target, strict=True)
        if int(label) in classes
    ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[at] for at in order]


@cache
def digits() -> Task:
    """Ten images of each of 5 to 9."""
    rows = images(range(5, 10))
    train = [row for label in range(5) for row in _of(rows, label)[:SHOTS]]
    rest = [row for label in range(5) for row in _of(rows, label)[SHOTS:]]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(1)).tolist()
    rest = [rest[at] for at in order]
    return Task(
        "digits", train, rest[:VALIDATION], rest[VALIDATION:], vit, epochs=40, batch_size=10
    )


def _of(rows: list[Example], label: int) -> list[Example]:
    return [row for row in rows if row["labels"] == label]


def vit(seed: int) -> nn.Module:
    """The base under a head drawn from the seed; trained once, and kept in `CACHE`."""
    if not CACHE.is_file():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        torch.save(pretrained(), CACHE)
    model = _fresh(seed)
    values = {k: v for k, v in torch.load(CACHE).items() if not k.startswith("classifier")}
    model.load_state_dict({**model.state_dict(), **values})
    return model


def _fresh(seed: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**SIZES))


def pretrained(epochs: int = EPOCHS) -> dict[str, torch.Tensor]:
    """The base's weights after training on the digits 0 to 4."""
    rows, model = images(range(5)), _fresh(0)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).tolist()
        for at in range(0, len(rows), BATCH):
            model(**collated([rows[i] for i in order[at : at + BATCH]])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()
