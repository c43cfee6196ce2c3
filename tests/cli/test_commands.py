"""Every command on real folders, as a process would call it: exit codes, JSON, files, errors of a line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors
from tests.models import llama, text_inputs
from vera_fx.cli.app import app

IDS = {"input_ids": text_inputs()["input_ids"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and an adapter of it."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = llama().eval()
    model.save_pretrained(root / "model")
    (root / "model" / "tokenizer_config.json").write_text("{}")
    config = vera_fx.VeraConfig(r=6, target_modules=["q_proj", "down_proj"])
    adapted = vera_fx.adapt(model, config)
    fill_vectors(adapted)
    vera_fx.save_adapter(adapted, root / "adapter")
    return root / "model", root / "adapter"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def found(*arguments: Any) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def adapted(folders: tuple[Path, Path]) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    return vera_fx.load_adapter(base, folders[1])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**IDS).logits


def test_doctor() -> None:
    report = found("doctor")
    versions = {row["name"]: row["version"] for row in report["libraries"]}
    assert versions["torch"] == torch.__version__
    assert versions["peft"] == peft.__version__
    assert report["torch.compile"] == "works"
    assert report["device"] == "cpu" or torch.accelerator.is_available()


def test_inspect_a_model(folders: tuple[Path, Path]) -> None:
    report = found("inspect", folders[0], "-r", 6, "-t", "q_proj", "-t", "down_proj")
    model = adapted(folders)
    rows = {row["name"]: row for row in report["linear modules"]}
    down = model.model.layers[0].mlp.down_proj
    assert rows["down_proj"]["in"], rows["down_proj"]["out"] == tuple(down.weight.shape[::-1])
    assert rows["down_proj"]["count"] == len(model.model.layers)
    vectors = [p for n, p in model.named_parameters() if "vera_lambda" in n]
    assert report["trainable"] == sum(p.numel() for p in vectors)
    assert report["model"] == "LlamaForCausalLM"


def test_inspect_an_adapter(folders: tuple[Path, Path]) -> None:
    report = found("inspect", folders[1])
    assert (report["rank"], report["kind"]) == (6, "Vera")
    assert report["targets"] == "down_proj, q_proj"
    table = run("inspect", folders[1])
    assert table.exit_code == 0
    assert "rank: 6" in table.stdout


def test_merge(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert found("merge", *folders, tmp_path / "merged")["copied"] == "tokenizer_config.json"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = logits(adapted(folders))
    assert_close(logits(plain), expected, factor=5)
    assert_far_apart(logits(AutoModelForCausalLM.from_pretrained(folders[0]).eval()), expected)


def test_convert(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert found("convert", *folders, tmp_path / "lora")["lost at most"] == 0
    base = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    lora = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    assert_close(logits(lora), logits(adapted(folders)), factor=5)
    small = found("convert", *folders, tmp_path / "small", "--rank", 2)
    assert 0 < small["lost at most"] < 1


@pytest.mark.parametrize("form", ["merged", "constant"])
def test_export(folders: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    out = tmp_path / "deep" / "model.pt2"
    found("export", *folders, out, "--form", form)
    program = vera_fx.load_program(out)
    mask = torch.ones_like(IDS["input_ids"])
    result = program.module()(**IDS, attention_mask=mask)["logits"]
    assert_close(result, logits(adapted(folders)), factor=5)


def test_export_to_onnx(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import onnxruntime

    found("export", *folders, tmp_path / "model.onnx", "--kind", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    given = {"input_ids": IDS["input_ids"], "attention_mask": torch.ones_like(IDS["input_ids"])}
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {name: value.numpy() for name, value in given.items()})
    result = torch.from_numpy(values[next(i for i, name in enumerate(names) if "logits" in name)])
    assert_close(result, logits(adapted(folders)), factor=10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "nowhere"), "no config.json"),
        (("inspect", "{model}", "-t", "missing"), "no module of this model matches"),
        (("inspect", "{model}", "-t", "q_proj", "--bits", "3"), "4, 8 or 16"),
        (("merge", "{model}", "{adapter}", "{model}"), "exists"),
        (("merge", "{model}", "{model}", "new"), "adapter"),
        (("convert", "{model}", "{adapter}", "new", "--rank", "99"), "rank"),
        (("export", "{model}", "{adapter}", "new", "--form", "odd"), "form"),
        (("export", "{model}", "{adapter}", "new", "--kind", "odd"), "program or onnx"),
    ],
)
def test_errors_are_a_line(
    folders: tuple[Path, Path], tmp_path: Path, arguments: tuple[str, ...], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model, adapter = folders
    result = run(*(word.format(model=model, adapter=adapter) for word in arguments))
    assert result.exit_code == 1
    lines = result.stderr.splitlines()  # transformers' progress may come before
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "new").exists()


def test_the_installed_command(folders: tuple[Path, Path]) -> None:
    code = "from vera_fx.cli.main import main; main()"
    command = [sys.executable, "-c", code, "inspect", str(folders[1]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rank"] == 6
