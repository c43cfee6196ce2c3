"""``vera-fx serve`` as a process, and what a user may get wrong."""

import dataclasses
import inspect
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)
from typer.testing import CliRunner

import vera_fx
from tests.helpers import fill_vectors
from tests.recipes import tiny
from vera_fx.cli.app import app
from vera_fx.cli.flags import texts_of
from vera_fx.serving.classify import classifier
from vera_fx.serving.limits import Limits

TEXT = "a fine film"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with three labels, and two adapters of it."""
    root = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    labels = {0: "bad", 1: "fair", 2: "good"}
    config = BertConfig(vocab_size=8, num_hidden_layers=2, id2label=labels, **sizes)
    BertForSequenceClassification(config).save_pretrained(root / "model")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / "model")
    for scale, name in ((0.5, "one"), (1.5, "two")):
        model = BertForSequenceClassification.from_pretrained(root / "model").eval()
        vera = vera_fx.VeraConfig(r=6, target_modules=["query", "intermediate.dense"])
        adapted = vera_fx.adapt(model, vera)
        fill_vectors(adapted, scale)
        vera_fx.save_adapter(adapted, root / "store" / name)
    return root


def eager(root: Path, name: str | None) -> list[float]:
    model = BertForSequenceClassification.from_pretrained(root / "model").eval()
    if name is not None:
        vera_fx.load_adapter(model, root / "store" / name)
    batch = AutoTokenizer.from_pretrained(root / "model")(TEXT, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits.softmax(-1)[0].tolist()


def wait(process: subprocess.Popen[bytes], address: str) -> None:
    for _ in range(600):
        assert process.poll() is None
        try:
            httpx.get(f"{address}/health")
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(address)


def test_both_adapters_answer_by_name(folders: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from vera_fx.cli.main import main; main()"
    parts = ["serve", str(folders / "model"), str(folders / "store"), "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-c", code, *parts], env=dict(os.environ))
    try:
        wait(process, f"http://127.0.0.1:{port}")
        found = {}
        for name in ("one", "two"):
            body = {"text": TEXT, "adapter": name}
            answer = httpx.post(f"http://127.0.0.1:{port}/classify", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            found[name] = answer.json()["scores"]
    finally:
        process.terminate()
        process.wait(30)
    for name, scores in found.items():
        assert list(scores) == ["bad", "fair", "good"]
        assert list(scores.values()) == pytest.approx(eager(folders, name), abs=1e-5)
    plain = eager(folders, None)
    for other in (list(found["one"].values()), plain):
        assert list(found["two"].values()) != pytest.approx(other, abs=1e-4)


def test_texts_of_one_batch_have_adapters_of_their_own(folders: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(folders / "model").eval()
    vera_fx.load_adapter(model, folders / "store" / "one", adapter_name="kind of all")
    vera_fx.AdapterStore(model, folders / "store")
    classify = classifier(model, AutoTokenizer.from_pretrained(folders / "model"))

    names = ["two", "one", "two"]
    found = classify([TEXT] * 3, names)

    for name, scores in zip(names, found, strict=True):
        assert scores == pytest.approx(eager(folders, name), abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-4)


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would have been served, and how."""
    found: dict[str, Any] = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: found.update(options, app=app))
    return found


def test_an_embedder_and_every_flag(caught: dict[str, Any], tmp_path: Path) -> None:
    vera = vera_fx.VeraConfig(r=6, target_modules=["query", "output.dense"])
    adapted = vera_fx.adapt(AutoModel.from_pretrained(tiny.bert(tmp_path / "model")), vera)
    fill_vectors(adapted)
    vera_fx.save_adapter(adapted, tmp_path / "store" / "one")
    flags = ("--pooling", "cls", "--length", "9", "--max-batch", "3", "--max-wait", "0.2",
             "--capacity", "5", "--threads", "1", "--device", "cpu", "--port", "1234", "--rate", "0.01",
             "--burst", "2", "--head-seconds", "7", "--text", "30")  # fmt: skip
    result = CliRunner().invoke(
        app, ["serve", str(tmp_path / "model"), str(tmp_path / "store"), *flags]
    )
    assert result.exit_code == 0, result.output
    assert "serves at http://127.0.0.1:1234: model BertModel" in result.stderr
    assert (caught["host"], caught["port"]) == ("127.0.0.1", 1234)
    assert caught["http"].limits.head_seconds == 7

    text = "cut after nine tokens"
    batch = AutoTokenizer.from_pretrained(tmp_path / "model")(
        text, return_tensors="pt", truncation=True, max_length=9
    )
    with torch.no_grad():
        state = adapted.eval()(**batch).last_hidden_state[0, 0]
    with TestClient(caught["app"]) as client:
        answers = [
            client.post("/embed", json={"inputs": sent, "adapter": "one"})
            for sent in (text, "x" * 31, text)
        ]
    assert answers[0].json()[0] == pytest.approx((state / state.norm()).tolist(), abs=1e-5)
    assert [answer.status_code for answer in answers[1:]] == [413, 429]


def test_every_limit_has_a_flag_that_says_what_it_is() -> None:
    names = {entry.name for entry in dataclasses.fields(Limits)}
    assert texts_of(Limits).keys() == names
    [command] = [c for c in app.registered_commands if c.name == "serve"]
    assert names <= inspect.signature(command.callback).parameters.keys()
    assert texts_of(Limits)["burst"] == "requests that one address may make at once after a rest"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--pooling", "cls"), "pooling is of embedders"),
        (("--length", "600"), "takes 512 tokens"),
        (("--capacity", "2", "--max-batch", "3"), "max_batch is 3"),
        (("--device", "odd"), "device is auto, cpu"),
        (("--device", "xla:7"), "there is no device 'xla:7' here"),
    ],
)
def test_wrong_flags(
    folders: Path, caught: dict[str, Any], flags: tuple[str, ...], words: str
) -> None:
    given = ["serve", str(folders / "model"), str(folders / "store"), *flags]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not caught


def test_missing_folders_and_a_short_key_are_a_line(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CliRunner().invoke
    result = run(app, ["serve", str(folders / "model"), str(folders / "nowhere")])
    assert result.exit_code == 1
    assert "holds no adapter" in result.stderr
    result = run(app, ["serve", str(folders / "nowhere"), str(folders / "store")])
    assert result.exit_code == 1
    assert "is no model folder" in result.stderr
    monkeypatch.setenv("VERA_FX_SERVER_KEY", "short")
    result = run(app, ["serve", str(folders / "model"), str(folders / "store")])
    assert result.exit_code == 1
    assert "fewer than 16" in result.stderr
