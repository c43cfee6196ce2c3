"""Trains one adapter for each of the four domains: python -m examples.server.train."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import vera_fx
from examples.server.minilm import CONFIG, DOMAINS, classifier, load_base
from examples.text_data import Dataset, Example, read_dataset
from vera_fx.serving.batcher import Classify

DATA = Path(__file__).parent.parent / "data/sentiment"
BATCH = 32

console = Console(width=100)


def datasets(held_out: int) -> dict[str, Dataset]:
    """The sentences of each domain: positive or negative, near-zero ratings left out."""
    options: dict[str, Any] = {"text": "text", "label": "rating", "ratings": True, "seed": 0}
    return {
        domain: read_dataset(DATA / f"{domain}.tsv.gz", held_out=held_out, **options)
        for domain in DOMAINS
    }


def train(domain: str, output: Path, examples: list[Example], steps: int) -> None:
    """Train and save one adapter."""
    model, tokenizer = load_base()
    vera_fx.adapt(model, CONFIG)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    vectors = [p for n, p in named if "vera_lambda" in n]
    head = [p for n, p in named if "vera_lambda" not in n]
    optimizer = torch.optim.AdamW([{"params": vectors, "lr": 1e-2}, {"params": head, "lr": 4e-3}])
    picked = random.Random(0)
    model.train()
    for _ in range(steps):
        batch = picked.sample(examples, BATCH)
        tokens = tokenizer(
            [e.text for e in batch],
            padding=True,
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        loss = model(**tokens, labels=torch.tensor([e.label for e in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vera_fx.save_adapter(model, output / "adapters" / domain)


def accuracies(classify: Classify, data: dict[str, Dataset]) -> dict[str, dict[str, float]]:
    """For each adapter, the share of every domain's held-out sentences that it judges right.

    All four judge in the same batches, row by row: what the server does.
    """
    found: dict[str, dict[str, float]] = {adapter: {} for adapter in DOMAINS}
    for domain, dataset in data.items():
        right: Counter[str] = Counter()
        for example in dataset.held_out:
            scores = classify([example.text] * len(DOMAINS), DOMAINS)
            for adapter, row in zip(DOMAINS, scores, strict=True):
                right[adapter] += row.index(max(row)) == example.label
        for adapter in DOMAINS:
            found[adapter][domain] = right[adapter] / len(dataset.held_out)
    return found


def show(found: dict[str, dict[str, float]], data: dict[str, Dataset]) -> None:
    """Print the table of adapters and domains."""
    table = Table("adapter", *(f"on {domain}" for domain in data))
    for adapter, row in found.items():
        table.add_row(adapter, *(f"{row[domain]:.1%}" for domain in data))
    labels = {domain: Counter(e.label for e in d.held_out) for domain, d in data.items()}
    most = (max(counts.values()) / counts.total() for counts in labels.values())
    table.add_row("always the commoner label", *(f"{share:.1%}" for share in most))
    console.print(table)


def main(
    output: Annotated[Path, typer.Option()] = Path("out/server"),
    steps: Annotated[int, typer.Option(min=1)] = 150,
    held_out: Annotated[int, typer.Option(min=1)] = 500,
) -> None:
    """Train the four adapters and show how each does on every domain's held-out sentences."""
    model, tokenizer = load_base()
    vera_fx.adapt(model, CONFIG)
    vera_fx.save_adapter(model, output / "kind")
    data = datasets(held_out)
    for domain, dataset in data.items():
        train(domain, output, dataset.train, steps)
        console.print(f"trained {domain}: {steps} batches of {BATCH}")
    model.eval()
    vera_fx.AdapterStore(model, output / "adapters")
    found = accuracies(classifier(model, tokenizer), data)
    show(found, data)
    (output / "accuracy.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
