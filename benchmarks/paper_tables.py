"""The VeRA paper's parameter and byte counts, counted from configurations on the meta device.

python -m benchmarks.paper_tables docs/paper.md
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import vera_fx
from vera_fx.base.targets import resolve_targets

QV = ("query", "value", "q_proj", "v_proj")
LINEAR = "all-linear"
SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "RoBERTa base": ("Roberta", {"hidden_size": 768, "num_hidden_layers": 12}),
    "RoBERTa large": (
        "Roberta",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "GPT-3": ("GPTNeo", {"hidden_size": 12288, "num_layers": 96, "num_heads": 96}),
    "GPT-2 medium": ("GPTNeo", {"hidden_size": 1024, "num_layers": 24, "num_heads": 16}),
    "GPT-2 large": ("GPTNeo", {"hidden_size": 1280, "num_layers": 36, "num_heads": 20}),
    "Llama 7B": (
        "Llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    ),
    "Llama 13B": (
        "Llama",
        {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    ),
    "ViT base": ("ViT", {"hidden_size": 768, "num_hidden_layers": 12}),
    "ViT large": (
        "ViT",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
}  # fmt: skip
"""transformers' class and sizes. GPT-2 and GPT-3 have query and value of their own here, as the paper counts them."""

SIZES["Llama 2 7B"], SIZES["Llama 2 13B"] = SIZES["Llama 7B"], SIZES["Llama 13B"]


@dataclass(frozen=True)
class Printed:
    """A row of the paper.

    Attributes:
        table: the table's number.
        model: a key of `SIZES`.
        method: what is trained.
        r: its rank.
        targets: which linears.
        numbers: parameters as printed.
        size: bytes as printed, or nothing.
        remark: why a count differs.
    """

    table: int
    model: str
    method: Literal["LoRA", "VeRA"]
    r: int
    targets: tuple[str, ...] | str
    numbers: str
    size: str = ""
    remark: str = ""


def _first_table() -> Iterator[Printed]:
    ranks = (1, 16, 256)
    with_both = "printed with the frozen A and B in it"
    printed: dict[tuple[str, Literal["LoRA", "VeRA"]], tuple[str, str, str]] = {
        ("RoBERTa base", "LoRA"): ("36.8K 589.8K 9437.1K", "144KB 2MB 36MB", ""),
        ("RoBERTa base", "VeRA"): ("18.4K 18.8K 24.5K", "72KB 74KB 96KB", ""),
        ("RoBERTa large", "LoRA"): ("98.3K 1572.8K 25165.8K", "384KB 6MB 96MB", ""),
        ("RoBERTa large", "VeRA"): ("49.2K 49.5K 61.4K", "192KB 195KB 240KB", ""),
        ("GPT-3", "LoRA"): ("4.7M 75.5M 1207.9M", "18MB 288MB 4.6GB", ""),
        ("GPT-3", "VeRA"): ("2.4M 2.8M 8.7M", "9.1MB 10.5MB 33MB", with_both),
    }
    for (model, method), (numbers, sizes, remark) in printed.items():
        for r, number, size in zip(ranks, numbers.split(), sizes.split(), strict=True):
            slip = "a slip: its bytes are right" if number == "49.5K" else ""
            yield Printed(1, model, method, r, QV, number, size, remark or slip)


_LORA_GPT2 = "taken over from LoRA's paper"
ROWS = (
    *_first_table(),
    Printed(2, "RoBERTa base", "LoRA", 8, QV, "0.3M"),
    Printed(2, "RoBERTa base", "VeRA", 1024, QV, "0.043M"),
    Printed(2, "RoBERTa large", "LoRA", 8, QV, "0.8M"),
    Printed(2, "RoBERTa large", "VeRA", 256, QV, "0.061M"),
    Printed(3, "GPT-2 medium", "LoRA", 4, QV, "0.35M", remark=_LORA_GPT2),
    Printed(3, "GPT-2 medium", "VeRA", 1024, QV, "0.098M"),
    Printed(3, "GPT-2 large", "LoRA", 4, QV, "0.77M", remark=_LORA_GPT2),
    Printed(3, "GPT-2 large", "VeRA", 1024, QV, "0.17M"),
    Printed(4, "Llama 7B", "LoRA", 64, LINEAR, "159.9M"),
    Printed(4, "Llama 7B", "VeRA", 1024, LINEAR, "1.6M"),
    Printed(4, "Llama 13B", "LoRA", 64, LINEAR, "250.3M"),
    Printed(4, "Llama 13B", "VeRA", 1024, LINEAR, "2.4M"),
    Printed(4, "Llama 2 7B", "LoRA", 64, LINEAR, "159.9M"),
    Printed(4, "Llama 2 7B", "VeRA", 1024, LINEAR, "1.6M"),
    Printed(4, "Llama 2 13B", "LoRA", 64, LINEAR, "250.3M"),
    Printed(4, "Llama 2 13B", "VeRA", 1024, LINEAR, "2.4M"),
    Printed(5, "ViT base", "LoRA", 8, QV, "294.9K"),
    Printed(5, "ViT base", "VeRA", 256, QV, "24.6K"),
    Printed(5, "ViT large", "LoRA", 8, QV, "786.4K"),
    Printed(5, "ViT large", "VeRA", 256, QV, "61.4K"),
)


@dataclass(frozen=True)
class Count:
    """What a row comes to.

    Attributes:
        trained: parameters that train.
        shared: numbers of A and B, which are frozen and drawn again from a seed.
    """

    trained: int
    shared: int


def on_meta(model: str) -> nn.Module:
    """A model of the paper without any values."""
    kind, sizes = SIZES[model]
    return _on_meta(kind, tuple(sizes.items()))


@cache
def _on_meta(kind: str, sizes: tuple[tuple[str, int], ...]) -> nn.Module:
    import transformers

    fields: dict[str, Any] = dict(sizes)
    if kind == "GPTNeo":
        fields["attention_types"] = [[["global"], fields["num_layers"]]]
    ending = "ForCausalLM" if kind in {"GPTNeo", "Llama"} else "Model"
    with torch.device("meta"):
        return getattr(transformers, kind + ending)(
            getattr(transformers, f"{kind}Config")(**fields)
        )


def count(row: Printed) -> Count:
    """Count a row: VeRA's by `vera_fx.memory_on_paper`, LoRA's as ``r (in + out)`` over the same targets."""
    model, targets = on_meta(row.model), _present(row)
    config = vera_fx.VeraConfig(r=row.r, target_modules=targets)
    if row.method == "LoRA":
        found = resolve_targets(model, config).values()
        return Count(sum(row.r * (t.in_features + t.out_features) for t in found), 0)
    memory = vera_fx.memory_on_paper(model, config)
    return Count(memory.vectors // 4, memory.projections // 4)


def _present(row: Printed) -> list[str] | str:
    if isinstance(row.targets, str):
        return row.targets
    names = {name.rpartition(".")[2] for name, _ in on_meta(row.model).named_modules()}
    return [name for name in row.targets if name in names]


_UNITS = {"KB": 2**10, "MB": 2**20, "GB": 2**30, "K": 10**3, "M": 10**6}


def agrees(value: float, printed: str) -> bool:
    """Whether a value, rounded or cut to the printed digits, is what is printed."""
    unit = next(u for u in _UNITS if printed.endswith(u))
    digits = printed.removesuffix(unit)
    step = 10.0 ** -len(digits.partition(".")[2])
    return -step / 2 <= value / _UNITS[unit] - float(digits) < step


def _cells(row: Printed) -> tuple[str, ...]:
    found = count(row)
    same = agrees(found.trained, row.numbers)
    size = 4 * found.trained
    shown = f"{size / 2**10:,.0f} KiB" if size < 2**20 else f"{size / 2**20:,.1f} MiB"
    shared = f"{4 * found.shared / 2**20:,.1f} MiB" if found.shared else ""
    where = "query, value" if row.targets == QV else "all linear but the head"
    verdict = "yes" if same else "**no**"
    if not same or row.remark.startswith("printed"):
        verdict += f": {row.remark}"
    return (
        str(row.table), row.model, f"{row.method} r={row.r}", where, f"{found.trained:,}",
        row.numbers, shown, row.size or "", shared, verdict,
    )  # fmt: skip


_COLUMNS = (
    "table", "model", "method", "targets", "trained", "printed", "fp32", "printed size",
    "A and B, not stored", "agrees",
)  # fmt: skip


def table() -> str:
    """The rows in Markdown."""
    lines = (" | ".join(_cells(row)) for row in ROWS)
    head = (" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS))
    return "\n".join(f"| {line} |" for line in (*head, *lines))


def page() -> str:
    """docs/paper.md."""
    big = [count(row) for row in ROWS if row.model == "GPT-3" and row.method == "VeRA"]
    exact = " / ".join(f"{c.trained:,}" for c in big)
    both = " / ".join(f"{c.trained + c.shared:,}" for c in big)
    lora = count(next(r for r in ROWS if (r.model, r.method, r.r) == ("GPT-3", "LoRA", 256)))
    parts = {"TABLE": table(), "EXACT": exact, "BOTH": both}
    parts["TIMES"] = f"{lora.trained / big[-1].trained:.0f}"
    parts["PRINTED_TIMES"] = f"{lora.trained / (big[-1].trained + big[-1].shared):.0f}"
    text = _PAGE
    for name, value in parts.items():
        text = text.replace(f"<{name}>", value)
    return text


_PAGE = (Path(__file__).parent / "paper_page.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
