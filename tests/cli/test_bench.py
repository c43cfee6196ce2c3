"""``vera-fx bench`` on real folders: what it measures, that it measures it, and what is refused."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.recipes import tiny
from vera_fx.bench import methods as bench_methods
from vera_fx.bench.methods import BASE, LORA, OURS, PEFT, Adapters, methods
from vera_fx.bench.timing import interleaved, peak
from vera_fx.cli.app import app

SMALL = ("--rank", "6", "--batch", "3", "--tokens", "9", "--rounds", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    tiny.llama(root / "llama")
    tiny.vit(root / "vit")
    return root


def found(*arguments: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_all_methods_and_their_ratios(root: Path) -> None:
    report = found(root / "llama", "-t", "q_proj", "-t", "down_proj", *SMALL)
    assert report["inputs"] == {"inputs_embeds": "3x9x24", "attention_mask": "3x9"}
    assert report["PEFT"] == "compared"
    for table in ("training step", "call without gradients"):
        rows = {row["method"]: row for row in report[table]}
        assert [*rows] == [BASE, OURS, PEFT, LORA]
        for row in rows.values():
            assert row["ms"] > 0
            assert row["/ base"] == pytest.approx(row["ms"] / rows[BASE]["ms"], abs=2e-3)
            assert row["/ PEFT"] == pytest.approx(row["ms"] / rows[PEFT]["ms"], abs=2e-3)
    trained = {row["method"]: row["trainable"] for row in report["training step"]}
    vectors = 2 * (6 + 24) * 2  # two targets with 24 outputs in two layers
    assert trained == {BASE: 0, OURS: vectors, PEFT: vectors, LORA: 2 * 8 * (24 + 24 + 40 + 24)}


def test_pictures_in_half_precision_without_peft(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vera_fx.cli.commands.bench.has_peft", lambda: False)
    monkeypatch.setattr(bench_methods, "has_peft", lambda: False)
    report = found(root / "vit", "-t", "q_proj", "--dtype", "bfloat16", *SMALL)
    assert report["inputs"] == {"pixel_values": "3x3x8x8"}
    assert report["PEFT"] == "not installed, so not compared"
    rows = report["training step"]
    assert [(row["method"], row["/ PEFT"]) for row in rows] == [(BASE, None), (OURS, None)]


def test_tables_for_people(root: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(root / "llama"), "-t", "q_proj", *SMALL])
    assert result.exit_code == 0, result.output
    assert "call without gradients" in result.stdout
    assert "PEFT VeRA" in result.stdout


def test_methods_train_over_the_same_weights(root: Path) -> None:
    """Every method's vectors move, the base's weights do not, and they are held once."""
    base = AutoModelForCausalLM.from_pretrained(root / "llama")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    states = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    inputs = {"inputs_embeds": states, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    made = methods(base, inputs, Adapters(6, ["q_proj"], 4), compiled=False)
    places = {value.data_ptr() for value in base.parameters()}
    for method in made:
        vectors = [p.detach().clone() for p in method.trained]
        method.step()
        moved = [not torch.equal(a, b) for a, b in zip(vectors, method.trained, strict=True)]
        assert any(moved) == bool(vectors)
        frozen = {p.data_ptr() for p in method.model.parameters() if not p.requires_grad}
        assert places <= frozen | {0}
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])


def test_times_and_memory_are_those_of_the_steps() -> None:
    order: list[str] = []

    def step(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    times = interleaved({"slow": step("slow", 0.03), "fast": step("fast", 0.01)}, 5)
    assert order == ["slow", "slow", "fast", "fast", *(["slow", "fast"] * 5)]
    assert 0.03 <= times["slow"].median < 0.2
    assert 0.01 <= times["fast"].median < times["slow"].median

    mib = peak(lambda: torch.ones(64 << 18).sum(), torch.device("cpu"))
    assert mib is None or 60 < mib < 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{root}/nowhere",), "is no model folder"),
        (("{root}/llama", "-t", "odd"), "no module of this model matches"),
        (("{root}/llama", "--tokens", "9999"), "takes 2048"),
        (("{root}/llama", "--dtype", "int8"), "dtype must be one of"),
    ],
)
def test_errors_are_a_line(root: Path, arguments: tuple[str, ...], words: str) -> None:
    given = [word.format(root=root) for word in arguments]
    result = CliRunner().invoke(app, ["bench", *given, "--device", "cpu"])
    assert result.exit_code == 1
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert words in result.stderr
