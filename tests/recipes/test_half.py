"""Bases in float16: the adapter's vectors train in float32 over them; heads that would not are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes import tiny
from vera_fx.errors import ConfigError
from vera_fx.recipes.train import train


def test_a_head_in_float16_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = tiny.bert(tmp_path / "model", layers=1)
    data = tiny.jsonl(tmp_path / "data.jsonl", tiny.sentences(8))
    recipe = tiny.recipe(
        task="classification", model=model, data=data, dtype="float16", steps=2, held_out=0
    )
    with pytest.raises(ConfigError, match=r"classifier.*in float16.*bfloat16 or float32"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_why_adamw_divides_zero_by_zero_there() -> None:
    """What the refusal says, and that PEFT's models meet it as well: theirs is torch's AdamW, too."""
    for dtype, ends in ((torch.float16, False), (torch.bfloat16, True), (torch.float32, True)):
        weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        weight.grad = torch.full_like(weight, 1e-4)
        weight.grad[0] = 0.0
        torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0).step()
        assert bool(weight.isfinite().all()) == ends


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vectors_train_in_float32_over_half_bases(tmp_path: Path, dtype: str) -> None:
    model = tiny.bert(tmp_path / "model", layers=1)
    rows = [
        {"anchor": row["text"], "positive": f"{row['label']} {row['text'][:9]}"}
        for row in tiny.sentences(8)
    ]
    data = tiny.jsonl(tmp_path / "data.jsonl", rows)
    fields = {"model": model, "data": data, "steps": 3, "batch_size": 8, "held_out": 0}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for kind in (dtype, "float32"):
        train(tiny.recipe(task="embeddings", dtype=kind, **fields), tmp_path / kind)
        found[kind] = load_file(tmp_path / kind / "adapter" / "adapter_model.safetensors")
    vectors = [name for name in found[dtype] if "vera_lambda" in name]
    assert len(vectors) == 4
    for name in vectors:
        ours, whole = found[dtype][name], found["float32"][name]
        assert ours.dtype == torch.float32
        start = 0.1 if "lambda_d" in name else 0.0
        assert not torch.equal(ours, torch.full_like(ours, start))
        torch.testing.assert_close(ours, whole, rtol=0.0, atol=0.04)  # three steps of 1e-2 at most
        near = (ours - whole).abs() < 1e-3
        assert near.float().mean() > 0.7, name  # and of one sign but where gradients nearly vanish
