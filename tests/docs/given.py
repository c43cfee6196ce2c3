"""What blocks of the documentation find there already: small models of random weights, texts, adapters.

``given="bert"`` in a block's info string calls `bert` here and puts what it returns into the page's names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vera_fx
from tests import models

Names = dict[str, Any]

START: Names = {"torch": torch, "nn": nn, "vera_fx": vera_fx, "Path": Path}
"""What every page has."""

WORDS = (
    "a", "film", "with", "no", "heart", "one", "of", "the", "best", "this", "year", "dull", "slow",
    "warm", "funny", "fine", "cast", "plot",
)  # fmt: skip
TEXTS = [" ".join(WORDS[start : start + 4]) for start in range(12)]
LABELS = [start % 2 for start in range(12)]


def tokenizer() -> Any:
    """One number per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="right", **special)


def saved(model: Any, folder: Path) -> Names:
    """A model and its tokenizer on disk, as any that was downloaded."""
    torch.manual_seed(0)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return {"folder": folder, "texts": TEXTS, "labels": LABELS}


def bert(folder: Path) -> Names:
    """The folder of a BERT, with texts and their labels."""
    return saved(models.bert(), folder / "bert")


def llama(folder: Path) -> Names:
    """The folder of a Llama, with texts."""
    return saved(models.llama(), folder / "llama")


def readme(folder: Path) -> Names:
    """What the README calls its model, batches and another copy of the base."""
    from transformers import AutoModelForSequenceClassification

    names = saved(models.bert(), folder / "path" / "to" / "model")
    batch = dict(tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    fresh = AutoModelForSequenceClassification.from_pretrained(names["folder"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labelled = [{"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(LABELS)}]
    return {"batches": labelled, "another_base": fresh, "ids": ids[:3], "mask": mask[:3]}


def pieces(folder: Path) -> Names:
    """Examples without a batch dimension, as `train_many` takes them."""
    encoded = tokenizer()(TEXTS)
    examples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, label in zip(encoded["input_ids"], LABELS, strict=True)
    ]
    return {"examples": examples, "data": examples[:8], "held_out": examples[8:]}


def adapted(build: Callable[[], nn.Module], **config: Any) -> Any:
    """An adapted model whose adapter does something."""
    torch.manual_seed(0)
    model = vera_fx.adapt(
        build(), vera_fx.VeraConfig(r=6, save_projection=False, **config), adapter_name="movies"
    )
    wake(model)
    return model.eval()


def wake(model: nn.Module) -> None:
    """Give every vector values that change the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_(std=0.5)


def two_adapters(_folder: Path) -> Names:
    """A Llama with the adapters movies and phones, and inputs of four rows."""
    model = adapted(models.llama)
    vera_fx.add_adapter(model, "phones")
    wake(model)
    ids = models.tokens(4, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"model": model, "inputs": inputs, "ids": ids[:3], "mask": torch.ones_like(ids[:3])}


def base(_folder: Path) -> Names:
    """A classifier that is not adapted yet."""
    return {"model": models.bert()}


def one_adapter(folder: Path) -> Names:
    """A classifier with one adapter, called once."""
    model = adapted(models.bert)
    ids = models.tokens(3, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        model(**inputs)
    names = {"model": model, "base": models.bert(), "inputs": inputs, "ids": ids}
    return {**names, "mask": inputs["attention_mask"]}


def two_classifiers(folder: Path) -> Names:
    """`one_adapter` with a second one, both of which may train; four rows with labels."""
    names = one_adapter(folder)
    vera_fx.add_adapter(names["model"], "phones")
    wake(names["model"])
    ids = models.tokens(4, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**names, "inputs": inputs, "labels": torch.tensor([0, 1, 0, 1])}


def customers(folder: Path) -> Names:
    """Folders of saved adapters beside a Llama that has one of their kind."""
    names = two_adapters(folder)
    for name in ("customer-3", "customer-17", "customer-4211"):
        vera_fx.save_adapter(names["model"], folder / "adapters" / name, adapter_name="movies")
    vera_fx.save_adapter(names["model"], folder / "upload", adapter_name="phones")
    return {**names, "inputs": {key: value[:2] for key, value in names["inputs"].items()}}


def exported(folder: Path) -> Names:
    """`one_adapter`, not yet called, with three more of its kind, one of them on disk without A and B."""
    names = one_adapter(folder)
    for name in ("other", "de", "fr"):
        vera_fx.add_adapter(names["model"], name)
    wake(names["model"])
    vera_fx.save_adapter(names["model"], folder / "out" / "other", adapter_name="other")
    return names


def two_saved(folder: Path) -> Names:
    """A plain Llama, inputs of three rows, and two adapters on disk."""
    names = two_adapters(folder)
    for name in ("movies", "phones"):
        vera_fx.save_adapter(names["model"], folder / "out" / name, adapter_name=name)
    inputs = {key: value[:3] for key, value in names["inputs"].items()}
    return {"model": models.llama().eval(), "inputs": inputs}


def jobs(folder: Path) -> Names:
    """What two jobs train on: a classifier, a configuration, examples."""
    config = vera_fx.VeraConfig(r=8, task_type="SEQ_CLS")
    plain = {"model": models.bert(), "config": config, "TrainSettings": vera_fx.TrainSettings}
    return {**pieces(folder), **plain}


GIVEN: dict[str, Callable[[Path], Names]] = {
    made.__name__: made
    for made in (
        bert, llama, readme, pieces, one_adapter, two_adapters, two_classifiers, customers,
        exported, two_saved, jobs, base,
    )
}  # fmt: skip
