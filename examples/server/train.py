"""Trains one adapter for each of the four domains: python -m examples.server.train."""

import random
from pathlib import Path
from typing import Annotated

import torch
import typer

import vera_fx
from examples.server.minilm import CONFIG, DOMAINS, classifier, load_base
from examples.text_data import Example, read_dataset

DATA = Path(__file__).parent.parent / "data/sentiment"


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
        batch = picked.sample(examples, 32)
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


def main(
    output: Annotated[Path, typer.Option()] = Path("out/server"),
    steps: Annotated[int, typer.Option(min=1)] = 150,
    held_out: Annotated[int, typer.Option(min=1)] = 300,
) -> None:
    """Train the four adapters and show how each does on every domain's held-out sentences."""
    kind, tokenizer = load_base()
    vera_fx.adapt(kind, CONFIG)
    vera_fx.save_adapter(kind, output / "kind")
    data = {
        domain: read_dataset(
            DATA / f"{domain}.tsv.gz",
            text="text", label="rating", ratings=True, held_out=held_out, seed=0,
        )
        for domain in DOMAINS
    }  # fmt: skip
    for domain, dataset in data.items():
        train(domain, output, dataset.train, steps)
        print(f"trained {domain}")
    kind.eval()
    vera_fx.AdapterStore(kind, output / "adapters")
    classify = classifier(kind, tokenizer)
    for adapter in DOMAINS:
        for domain, dataset in data.items():
            texts = [e.text for e in dataset.held_out]
            scores = torch.tensor(classify(texts, [adapter] * len(texts)))
            right = scores.argmax(-1) == torch.tensor([e.label for e in dataset.held_out])
            print(f"{adapter} on {domain}: {right.float().mean():.1%}")


if __name__ == "__main__":
    typer.run(main)
