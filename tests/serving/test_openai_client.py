"""OpenAI's own client against a server on a port: vectors, encodings, batches, models, errors as it reads them."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.test_embedders import NAMES, TEXTS, expected, opened, root
from vera_fx.serving.embed_app import create_embedding_app
from vera_fx.serving.limits import Limits

openai = pytest.importorskip("openai")
__all__ = ["root"]  # the fixture


@contextlib.contextmanager
def served(root: Path, **limits: Any) -> Iterator[Any]:
    """A client of a server that runs in a thread of this process."""
    import uvicorn

    found = opened(root)
    app = create_embedding_app(found.answer, found.store, limits=Limits(**limits))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.should_exit = True
        thread.join(timeout=30)


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[Any]:
    with served(root, text=40, inputs=3, rate=0) as client:
        yield client


@pytest.mark.parametrize("how", [{}, {"encoding_format": "float"}, {"dimensions": 24}])
def test_vectors(root: Path, client: Any, how: dict[str, Any]) -> None:
    """Unless told otherwise the client asks for base64, and decodes it."""
    answer = client.embeddings.create(model="two", input=TEXTS, **how)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    for entry, text in zip(answer.data, TEXTS, strict=True):
        assert entry.embedding == pytest.approx(expected(root, text, "two"), abs=1e-5)
        assert entry.embedding != pytest.approx(expected(root, text, "one"), abs=1e-3)
    assert answer.usage.prompt_tokens == sum(len(text) + 2 for text in TEXTS)


def test_one_text_and_the_bytes_of_base64(root: Path, client: Any) -> None:
    plain = client.embeddings.create(model="one", input=TEXTS[0], encoding_format="float")
    packed = client.embeddings.create(model="one", input=TEXTS[0], encoding_format="base64")
    assert isinstance(packed.data[0].embedding, str)
    assert plain.data[0].embedding == pytest.approx(expected(root, TEXTS[0], "one"), abs=1e-5)
    decoded = client.embeddings.create(model="one", input=TEXTS[0]).data[0].embedding
    assert decoded == pytest.approx(plain.data[0].embedding, abs=1e-6)


def test_adapters_are_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == sorted(set(NAMES))
    assert client.models.retrieve("two").id == "two"
    with pytest.raises(openai.NotFoundError, match="no such adapter"):
        client.models.retrieve("three")


@pytest.mark.parametrize(
    ("asked", "kind", "words", "param"),
    [
        ({"model": "three"}, "NotFoundError", "no such adapter", None),
        ({"dimensions": 8}, "UnprocessableEntityError", "24 dimensions", "dimensions"),
        ({"input": [1, 2]}, "UnprocessableEntityError", "valid string", "input"),
        ({"input": []}, "UnprocessableEntityError", "at least 1", "input"),
        ({"input": ["a"] * 4}, "APIStatusError", "at most 3 texts", None),
        ({"input": "a" * 41}, "APIStatusError", "more than 40 characters", None),
    ],
)
def test_errors_are_of_openais_form(
    client: Any, asked: dict[str, Any], kind: str, words: str, param: str | None
) -> None:
    with pytest.raises(getattr(openai, kind), match=words) as caught:
        client.embeddings.create(**{"model": "one", "input": "a", **asked})
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
    assert words in caught.value.body["message"]
    assert (caught.value.code == "model_not_found") == (caught.value.status_code == 404)


def test_a_gate_that_refuses_says_it_in_the_same_form(root: Path) -> None:
    with served(root, rate=0.01, burst=1) as client:
        client.models.list()
        with pytest.raises(openai.RateLimitError, match="too many requests") as caught:
            client.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 0
