"""docs/paper.md is what the library counts; a model of every architecture is what PEFT trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import vera_fx
from benchmarks import paper_tables
from benchmarks.paper_tables import ROWS, Printed, agrees, count

PAGE = Path(__file__).parents[1] / "docs" / "paper.md"


def row(model: str, method: str, r: int) -> Printed:
    return next(row for row in ROWS if (row.model, row.method, row.r) == (model, method, r))


def test_the_page_is_what_is_counted() -> None:
    assert PAGE.read_text(encoding="utf-8") == paper_tables.page()


@pytest.mark.parametrize(
    ("model", "r", "numbers"),
    [
        ("RoBERTa base", 1024, 12 * 2 * (1024 + 768)),
        ("RoBERTa large", 256, 24 * 2 * (256 + 1024)),
        ("GPT-2 medium", 1024, 24 * 2 * (1024 + 1024)),
        ("GPT-2 large", 1024, 36 * 2 * (1024 + 1280)),
        ("GPT-3", 256, 2_408_448),
        ("Llama 7B", 1024, 32 * (7 * 1024 + 5 * 4096 + 2 * 11008)),
        ("Llama 13B", 1024, 40 * (7 * 1024 + 5 * 5120 + 2 * 13824)),
        ("Llama 2 7B", 1024, 1_589_248),
        ("Llama 2 13B", 1024, 2_416_640),
        ("ViT base", 256, 12 * 2 * (256 + 768)),
        ("ViT large", 256, 24 * 2 * (256 + 1024)),
    ],
)
def test_counts_by_hand(model: str, r: int, numbers: int) -> None:
    assert count(row(model, "VeRA", r)).trained == numbers


def test_only_the_known_rows_disagree() -> None:
    off = {
        (r.table, r.model, r.method, r.r) for r in ROWS if not agrees(count(r).trained, r.numbers)
    }
    assert off == {
        (1, "RoBERTa large", "VeRA", 16),
        (1, "GPT-3", "VeRA", 16),
        (1, "GPT-3", "VeRA", 256),
        (3, "GPT-2 medium", "LoRA", 4),
        (3, "GPT-2 large", "LoRA", 4),
    }


def test_gpt3s_printed_row_is_the_count_and_the_frozen_projections() -> None:
    for r, numbers, size in ((1, "2.4M", "9.1MB"), (16, "2.8M", "10.5MB"), (256, "8.7M", "33MB")):
        found = count(row("GPT-3", "VeRA", r))
        assert found.shared == 2 * 12288 * r
        assert agrees(found.trained + found.shared, numbers)
        assert agrees(4 * (found.trained + found.shared), size)


@pytest.mark.parametrize(
    "kept", [r for r in ROWS if r.table == 1 and r.size and r.model != "GPT-3"]
)
def test_bytes(kept: Printed) -> None:
    assert agrees(4 * count(kept).trained, kept.size)


@pytest.mark.parametrize(
    ("value", "printed", "same"),
    [(24_576, "24.5K", True), (24_576, "24.6K", True), (24_576, "24.7K", False),
     (24_576, "24.4K", False), (2_408_448, "2.4M", True), (98_304, "96KB", True)],
)  # fmt: skip
def test_agreement_is_rounding_or_cutting(value: int, printed: str, same: bool) -> None:
    assert agrees(value, printed) is same


@pytest.mark.parametrize(
    ("model", "method", "r"),
    [("RoBERTa base", "VeRA", 1024), ("Llama 7B", "VeRA", 1024), ("ViT base", "VeRA", 256),
     ("GPT-2 large", "VeRA", 1024), ("RoBERTa base", "LoRA", 8), ("Llama 7B", "LoRA", 64)],
)  # fmt: skip
def test_as_peft_counts_it(model: str, method: str, r: int) -> None:
    """Two layers of each: PEFT draws A and B, and LoRA's matrices, even where nothing else has values."""
    kind, sizes = paper_tables.SIZES[model]
    layers = next(name for name in ("num_layers", "num_hidden_layers") if name in sizes)
    paper_tables.SIZES["two layers"] = (kind, {**sizes, layers: 2})
    try:
        short = replace(row(model, method, r), model="two layers")
        ours, base = count(short).trained, paper_tables.on_meta("two layers")
        targets: Any = paper_tables._present(short)
    finally:
        del paper_tables.SIZES["two layers"]
    config = (peft.VeraConfig if method == "VeRA" else peft.LoraConfig)(r=r, target_modules=targets)
    theirs = peft.get_peft_model(fresh(base), config)
    assert theirs.get_nb_trainable_parameters()[0] == ours


def fresh(base: Any) -> Any:
    """PEFT changes the model, and `on_meta` keeps it."""
    with torch.device("meta"):
        return type(base)(base.config)


def test_gpt2_as_transformers_has_it() -> None:
    """What the page says of the fused query, key and value."""
    for width, layers, numbers in ((1024, 24, 98_304), (1280, 36, 175_104)):
        config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=16)
        with torch.device("meta"):
            model = transformers.GPT2LMHeadModel(config)
        found = vera_fx.memory_on_paper(model, vera_fx.VeraConfig(r=1024))
        assert found.vectors == 4 * numbers
        assert f"{numbers:,}" in PAGE.read_text(encoding="utf-8")
