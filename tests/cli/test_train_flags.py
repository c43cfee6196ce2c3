"""``train`` with each of its rarer flags, end to end: what they change, and what they must not."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import vera_fx
from tests.recipes import tiny
from vera_fx.cli.app import app
from vera_fx.recipes import train as recipes_train


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were trained; caches go away with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    made, adapted = list[Any](), recipes_train.adapted

    def kept(*given: Any) -> Any:
        made.append(adapted(*given))
        return made[-1]

    monkeypatch.setattr(recipes_train, "adapted", kept)
    return made


def done(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def trained(
    tmp_path: Path, *flags: Any, name: str, rows: list[dict[str, Any]] | None = None
) -> dict[str, torch.Tensor]:
    """The adapter of a short run."""
    data = tiny.jsonl(tmp_path / "data.jsonl", rows or tiny.sentences(16))
    if not (tmp_path / "model").exists():
        tiny.bert(tmp_path / "model")
    board = () if "--tensorboard" in flags else ("--no-tensorboard",)
    done(
        "train", tmp_path / name, "--task", "classification", "--model", tmp_path / "model",
        "--data", data, "--rank", 6, "-t", "query", "-t", "output.dense", "--batch-size", 4, "--steps", 3,
        "--rate", 0.1, "--device", "cpu", "--held-out", 4, "--log-every", 1, *board, *flags,
    )  # fmt: skip
    return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two adapters."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def mean_apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The mean difference of vectors; AdamW turns single tiny gradients into whole steps."""
    names = [name for name in one if "lambda_b" in name]
    return torch.cat([(one[name] - other[name]).abs().float() for name in names]).mean().item()


def moved(adapter: dict[str, torch.Tensor]) -> float:
    """How far the vectors that begin at zero have come."""
    return max(v.abs().max().item() for name, v in adapter.items() if "lambda_b" in name)


@pytest.mark.slow
def test_compile(tmp_path: Path) -> None:
    plain = trained(tmp_path, name="plain")
    counters.clear()
    compiled = trained(tmp_path, "--compile", name="compiled")
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert apart(compiled, plain) < 1e-3 < moved(plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, models: list[Any], dtype: str) -> None:
    """The base of a language model is in half precision, its vectors are not."""
    data = tiny.jsonl(tmp_path / "data.jsonl", [{"text": row["text"]} for row in tiny.sentences(8)])
    model, found = tiny.llama(tmp_path / "model"), list[dict[str, torch.Tensor]]()
    for kind in ("float32", dtype):
        done(
            "train", tmp_path / kind, "--task", "causal-lm", "--model", model, "--data", data,
            "--rank", 6, "-t", "q_proj", "-t", "down_proj", "--batch-size", 4, "--steps", 3, "--rate", 0.01,
            "--device", "cpu", "--held-out", 0, "--length", 32, "--no-tensorboard", "--dtype", kind,
        )  # fmt: skip
        found.append(load_file(tmp_path / kind / "adapter" / "adapter_model.safetensors"))
    base, vectors = set[torch.dtype](), set[torch.dtype]()
    for name, parameter in models[1].named_parameters():
        (vectors if "vera_lambda" in name else base).add(parameter.dtype)
    assert base == {getattr(torch, dtype)}
    assert vectors == {torch.float32}
    assert 0 < mean_apart(*found) < moved(found[0]) / 4


def test_checkpointing(tmp_path: Path, models: list[Any]) -> None:
    """The same bits, from layers that are computed again."""
    plain = trained(tmp_path, name="plain")
    again = trained(tmp_path, "--checkpointing", name="again")
    assert apart(again, plain) == 0 < moved(plain)
    counts = [
        sum(map(int, re.findall(r"CheckpointLayers +BITWISE +(\d+)", str(vera_fx.explain(model)))))
        for model in models
    ]
    assert counts[0] == 0 < counts[1]


def test_text_pairs(tmp_path: Path) -> None:
    """Both texts reach the model, in training and after it, as PEFT's would get them."""
    base = AutoModel.from_pretrained(tiny.bert(tmp_path / "model"))
    for name, parameter in base.named_parameters():
        # Fresh weights are so small that no text changes much.
        parameter.data *= 1 if "Norm" in name else 10
    base.save_pretrained(tmp_path / "model")
    rows = [{**row, "text_pair": row["text"][5::-1] + "!"} for row in tiny.sentences(16)]
    adapter = trained(tmp_path, name="pairs", rows=rows)
    assert apart(adapter, trained(tmp_path, name="single")) > 1e-3
    asked = [{"text": "abc", "text_pair": "xyz"}, {"text": "abc", "text_pair": "bbb d"}]
    lines = done("predict", tmp_path / "pairs", tiny.jsonl(tmp_path / "new.jsonl", asked)).stdout
    answers = [json.loads(line)["scores"] for line in lines.splitlines()]

    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "pairs" / "adapter").eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    for row, scores in zip(asked, answers, strict=True):
        with torch.no_grad():
            batch = words(row["text"], row["text_pair"], return_tensors="pt")
            high, low = theirs(**batch).logits.softmax(-1)[0].tolist()
        assert scores == pytest.approx({"high": high, "low": low}, abs=1e-4)
    assert answers[0] != pytest.approx(answers[1], abs=1e-2)


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, "--tensorboard", "--evaluate-every", 1, name="run")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]
    for name in ("loss", "accuracy", "f1"):
        said = [(entry["step"], entry[name]) for entry in metrics["evaluations"]]
        shown = [(event.step, event.value) for event in board.Scalars(f"eval/{name}")]
        assert [step for step, _ in shown] == [1, 2, 3]
        assert [v for _, v in shown] == pytest.approx([v for _, v in said], rel=1e-5)
