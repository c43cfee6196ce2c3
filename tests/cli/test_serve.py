"""``vera-fx serve`` as a process, and what a user may get wrong."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizer
from typer.testing import CliRunner

import vera_fx
from tests.helpers import fill_vectors
from vera_fx.cli.app import app
from vera_fx.serving.classify import classifier

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
