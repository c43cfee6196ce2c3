"""The example server: right answers from mixed batches, hostile clients harm nobody else."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from examples.server.app import Limits, create_app
from examples.server.batcher import Batcher
from tests.helpers import assert_close
from tests.test_store import CONFIG, DAMAGES, WEIGHTS, make

LABELS = ("bad", "fair", "good")


def encode(texts: Any) -> torch.Tensor:
    """Digits of a text as its features."""
    return torch.tensor([[float(c) for c in text[:5]] for text in texts])


@pytest.fixture
def world(tmp_path: Path) -> tuple[Any, Any, Any, list[int]]:
    model, store, _ = make(tmp_path / "adapters", 5, capacity=4)
    sizes: list[int] = []

    def classify(texts: Any, names: Any) -> list[list[float]]:
        sizes.append(len(texts))
        with torch.no_grad():
            return model(encode(texts), adapter_names=list(names)).tolist()

    options = {"max_batch": 4, "max_wait": 0.05}
    limits = Limits(text=5, upload=200_000, adapters=6)
    return create_app(classify, store, LABELS, limits=limits, **options), store, model, sizes


@pytest.fixture
def client(world: Any) -> Iterator[TestClient]:
    with TestClient(world[0]) as client:
        yield client


def ask(client: Any, text: str, adapter: str) -> Any:
    return client.post("/classify", json={"text": text, "adapter": adapter})


def assert_answer(world: Any, response: Any, text: str, adapter: str) -> None:
    assert response.status_code == 200, response.text
    with torch.no_grad():
        expected = world[2](encode([text]), adapter_names=[adapter])[0]
    scores = response.json()["scores"]
    assert_close(torch.tensor([scores[label] for label in LABELS]), expected)
    assert response.json()["label"] == LABELS[int(expected.argmax())]


def body(folder: Path, **changes: Any) -> dict[str, Any]:
    config = json.loads((folder / CONFIG).read_text())
    weights = base64.b64encode((folder / WEIGHTS).read_bytes()).decode()
    return {"config": {**config, **changes}, "weights": weights}


def test_answers_health_metrics(world: Any, client: TestClient) -> None:
    for number in range(5):
        assert_answer(
            world, ask(client, f"1234{number}", f"s{number}"), f"1234{number}", f"s{number}"
        )
    assert client.get("/health").json() == {"status": "ok", "adapters": 5}
    assert ask(client, "11111", "nobody").status_code == 404
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'http_responses_total{status="200"} 6',
        "adapter_evictions_total 1",
        "rows_total 5",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"text": "123456", "adapter": "s0"}, 413),
        ({"text": "", "adapter": "s0"}, 422),
        ({"text": "11111"}, 422),
        ({"text": "11111", "adapter": "../home"}, 404),
        ({"text": "11111", "adapter": "__base__"}, 404),
        ({"text": "11111", "adapter": "x" * 200}, 422),
    ],
)
def test_bad_questions(client: TestClient, sent: Any, status: int) -> None:
    assert client.post("/classify", json=sent).status_code == status


def test_upload_serve_delete(world: Any, client: TestClient) -> None:
    source = world[1].folder / "s1"
    assert client.put("/adapters/new", json=body(source)).status_code == 201
    assert_answer(world, ask(client, "54321", "new"), "54321", "s1")
    assert client.put("/adapters/new", json=body(source)).status_code == 409
    assert client.put("/adapters/more", json=body(source)).status_code == 507
    assert client.delete("/adapters/new").status_code == 204
    assert client.delete("/adapters/new").status_code == 404
    assert ask(client, "54321", "new").status_code == 404
    assert client.put("/adapters/a.b", json=body(source)).status_code == 400
    assert client.put("/adapters/..%2Fhome", json=body(source)).status_code in {400, 404}
    assert client.put("/adapters/re", json=body(source, target_modules="(a+)+$")).status_code == 422
    assert client.put("/adapters/big", content=b"x" * 200_001).status_code == 413
    for wrong in (b"", b"[]", b"{", b'{"config": {}, "weights": "?"}', b"[" * 100_000):
        assert client.put("/adapters/odd", content=wrong).status_code == 422
    assert world[1].names() == [f"s{n}" for n in range(5)]


def test_hostile_uploads_and_damaged_files(world: Any, client: TestClient, tmp_path: Path) -> None:
    import shutil

    for number, (damage, _) in enumerate(DAMAGES):
        folder = tmp_path / f"hostile{number}"
        shutil.copytree(world[1].folder / "s0", folder)
        damage(folder)
        if (folder / WEIGHTS).exists() and (folder / CONFIG).read_text().startswith("{"):
            assert client.put("/adapters/hostile", json=body(folder)).status_code == 422
    (world[1].folder / "s3" / WEIGHTS).write_bytes(b"junk")
    assert ask(client, "11111", "s3").status_code == 422
    assert_answer(world, ask(client, "12345", "s0"), "12345", "s0")


def test_one_bad_adapter_in_a_batch_and_a_stop_that_answers(world: Any) -> None:
    _, store, model, _ = world

    def classify(texts: Any, names: Any) -> list[list[float]]:
        if "99999" in texts:
            raise ValueError("a text that the model cannot take")
        return model(encode(texts), adapter_names=list(names)).tolist()

    async def run() -> list[Any]:
        batcher = Batcher(classify, store, max_batch=4, max_wait=0.05)
        batcher.start()
        asked = [("11111", "s0"), ("22222", "s1"), ("99999", "s2"), ("33333", "s4"), ("1234", "s0")]
        waiting = [asyncio.create_task(batcher.submit(*question)) for question in asked]
        await asyncio.sleep(0)
        store.delete("s1")  # while its request waits
        await batcher.stop()
        return await asyncio.gather(*waiting, return_exceptions=True)

    answers = asyncio.run(run())
    kinds = [type(answer).__name__ for answer in answers]
    assert kinds == ["list", "AdapterError", "ValueError", "list", "CaptureError"]


def test_a_real_server_mixes_what_waits(world: Any) -> None:
    app, store, _, sizes = world
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    questions = [(f"{n % 10}{n // 10}123", f"s{n % 5}") for n in range(24)]

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", trust_env=False
        ) as client:
            return await asyncio.gather(*(ask(client, *question) for question in questions))

    try:
        answers = asyncio.run(all_at_once())
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
    for answer, question in zip(answers, questions, strict=True):
        assert_answer(world, answer, *question)
    assert sum(sizes) == 24
    assert len(sizes) < 24  # requests did share batches
    assert max(sizes) <= 4
    assert len(store.loaded()) <= 4
