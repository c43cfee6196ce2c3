"""What `benchmarks.many_jobs` trains: a base, and the rows of every job."""

from dataclasses import dataclass
from typing import Any

import torch
import typer
from torch import Tensor, nn

from vera_fx.training.examples import padding_for

TARGETS: dict[str, Any] = {"minilm": ["query", "value"], "llama": "all-linear"}

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """As many rows, of as many jobs.

    Attributes:
        shape: ``"minilm"`` or ``"llama"``.
        jobs: among which the rows are dealt out.
        rows: of all jobs together.
        length: tokens of a row; of sentences, as many as they have.
        data: ``"random"``: rows of one length over random weights; ``"sentiment"``: sentences of the
            four domains, a domain after the other for each job, over the pretrained MiniLM.
    """

    shape: str
    jobs: int
    rows: int
    length: int
    data: str = "random"

    @property
    def targets(self) -> Any:
        """Of the adapters."""
        return TARGETS[self.shape]

    def base(self, device: str = "cpu") -> nn.Module:
        """The model that is adapted, without dropout."""
        if self.data == "sentiment":
            from benchmarks.quality.tasks import minilm

            return minilm(0).to(device)
        return _random_base(self.shape).to(device)

    def examples(self) -> list[Rows]:
        """Every job's rows: those of one step, and the same ones in every step."""
        each = self.rows // self.jobs
        if self.data == "sentiment":
            return [_sentences(job, each) for job in range(self.jobs)]
        rows = _random_rows(self.shape, self.rows, self.length)
        return [rows[job * each : (job + 1) * each] for job in range(self.jobs)]

    def batches(self, device: str = "cpu", *, together: bool = False) -> list[dict[str, Tensor]]:
        """Every job's rows as a batch, padded to its own longest; or ``together`` as one batch."""
        found = self.examples()
        parts = [[row for rows in found for row in rows]] if together else found
        return [
            {name: value.to(device) for name, value in padding_for(0)(rows).items()}
            for rows in parts
        ]


def _random_base(shape: str) -> nn.Module:
    """MiniLM's layers with a classifier, or two layers of Llama's architecture; random weights."""
    import transformers

    torch.manual_seed(0)
    if shape == "llama":
        sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
        config: Any = transformers.LlamaConfig(vocab_size=1000, num_hidden_layers=2, **sizes)
        return transformers.LlamaForCausalLM(config)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=1000, num_hidden_layers=6, **sizes, **off)
    return transformers.BertForSequenceClassification(config)


def _random_rows(shape: str, rows: int, length: int) -> Rows:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 1000, (rows, length), generator=generator)
    mask = torch.ones(length, dtype=torch.long)
    return [
        {
            "input_ids": row,
            "attention_mask": mask,
            "labels": row if shape == "llama" else int(row[0]) % 2,
        }
        for row in ids
    ]


def _sentences(job: int, each: int) -> Rows:
    """A job's own sentences of its domain: no two jobs have one in common."""
    from benchmarks.quality.tasks import DOMAINS, sentiment

    first = job // len(DOMAINS) * each
    found = sentiment(DOMAINS[job % len(DOMAINS)]).train[first : first + each]
    if len(found) < each:
        raise typer.BadParameter(f"{each} sentences are wanted for job {job}, {len(found)} left")
    return found
