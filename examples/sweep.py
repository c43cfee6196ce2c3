"""Sixteen learning rates and ranks at once, on movie sentences: a table, a picture, the best adapter saved.

python examples/sweep.py                      # MiniLM, 16 jobs in one batch
python examples/sweep.py --steps 300 --data my.csv --text body --label topic --classes
"""

import random
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from finetune import HERE, bundled_model, load_base
from rich.console import Console
from text_data import DataError, Dataset, Example, read_dataset
from torch import nn
from transformers import AutoTokenizer, logging

import vera_fx

RATES = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1)
RANKS = (64, 256)
TOKENS = 512
"""Of a pass through the base: rows of like length, so that little of it is padding."""

console = Console()


def tokenised(tokenizer: Any, examples: list[Example], length: int) -> list[dict[str, Any]]:
    """Examples as the model takes them, without padding."""
    texts = [example.text for example in examples]
    found = tokenizer(texts, truncation=True, max_length=length)
    fields = {key: found[key] for key in ("input_ids", "attention_mask")}
    return [
        {**{key: values[at] for key, values in fields.items()}, "labels": example.label}
        for at, example in enumerate(examples)
    ]


def jobs_for(
    data: list[dict[str, Any]], steps: int, batch_size: int
) -> dict[str, tuple[vera_fx.VeraConfig, list[dict[str, Any]], vera_fx.TrainSettings]]:
    """One job for each rate and rank. They take the same examples in the same order."""
    found = {}
    for rank in RANKS:
        config = vera_fx.VeraConfig(r=rank, target_modules=["query", "value"], task_type="SEQ_CLS")
        for rate in RATES:
            settings = vera_fx.TrainSettings(
                steps=steps,
                batch_size=batch_size,
                lr=rate,
                copies_lr=0.4 * rate,
                warmup=round(0.06 * steps),
            )
            found[f"r{rank}-lr{rate:g}".replace(".", "_")] = (config, data, settings)
    return found


def without_dropout(model: nn.Module) -> nn.Module:
    """The base's own dropout off: jobs then differ by rate and rank alone, and no masks are drawn."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def picture(results: vera_fx.TrainResults, jobs: dict[str, Any], width: int = 40) -> str:
    """Accuracy against learning rate, a line for each rate and rank, in characters."""
    lines = []
    for rank in RANKS:
        for name, (config, _, settings) in jobs.items():
            share = results[name].accuracy
            if config.r == rank:
                bar = "" if share is None else "#" * round(width * max(0.0, share - 0.4) / 0.6)
                lines.append(f"r={rank:<4} lr={settings.lr:<6g} |{bar:<{width}}| {share or 0:.1%}")
    return "\n".join((*lines, " " * 15 + f"|40 %{' ' * (width - 9)}100 %|"))


def run(dataset: Dataset, folder: Path, output: Path, options: dict[str, int]) -> bool:
    """Sweep, show, save the best; returns whether some job has ended well."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, held = (
        tokenised(tokenizer, part, options["length"]) for part in (dataset.train, dataset.held_out)
    )
    model = without_dropout(load_base(folder, dataset.classes, options["seed"]))
    jobs = jobs_for(train, options["steps"], options["batch_size"])
    console.print(f"{len(jobs)} jobs of {options['steps']} steps, {len(held)} sentences held out")
    results = vera_fx.train_many(
        model,
        jobs,
        held_out=dict.fromkeys(jobs, held),
        tokens_per_pass=TOKENS,
        state=output / "state",
    )
    console.print(str(results), markup=False, highlight=False)
    console.print(picture(results, jobs), markup=False, highlight=False)
    results.save(output / "results.json")
    done = {name: found.accuracy for name, found in results.items() if found.accuracy is not None}
    if not done:
        return False
    best = max(done, key=lambda name: done[name])
    vera_fx.save_adapter(model, output / "best", adapter_name=best)
    console.print(f"best: {best}, {done[best]:.1%} right; saved for PEFT in {output / 'best'}")
    return True


def main(
    data: Annotated[Path, typer.Option(help="TSV, CSV or JSONL file, may be gzipped")] = HERE
    / "data/sentiment/movies.tsv.gz",
    text: Annotated[str, typer.Option(help="column of the sentence")] = "text",
    label: Annotated[str, typer.Option(help="column of the label")] = "rating",
    classes: Annotated[
        bool, typer.Option("--classes", help="labels are classes, not ratings")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="folder of a Hugging Face model")] = None,
    output: Annotated[Path, typer.Option(help="where results and the adapter go")] = Path(
        "out/sweep"
    ),
    steps: Annotated[int, typer.Option(min=1, help="of each job")] = 120,
    batch_size: Annotated[int, typer.Option(min=1, help="sentences of a step of one job")] = 4,
    length: Annotated[int, typer.Option(min=2, help="longest sentence, in tokens")] = 48,
    held_out: Annotated[int, typer.Option(min=1, help="sentences kept for evaluation")] = 200,
    seed: int = 0,
) -> None:
    """Train sixteen VeRA adapters in one batch, and see which learning rate and rank do best."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    random.seed(seed)
    torch.manual_seed(seed)
    options = {"steps": steps, "batch_size": batch_size, "length": length, "seed": seed}
    try:
        dataset = read_dataset(
            data, text=text, label=label, ratings=not classes, held_out=held_out, seed=seed
        )
        fine = run(dataset, model or bundled_model(), output, options)
    except (DataError, OSError, vera_fx.VeraFxError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    typer.run(main)
