"""The example server: right answers from mixed batches, hostile clients harm nobody else."""

import asyncio
import base64
import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from examples.server import load
from tests.checkpoint.test_store import CONFIG, DAMAGES, WEIGHTS, make
from tests.helpers import assert_close
from vera_fx.serving.app import create_app
from vera_fx.serving.batcher import Batcher
from vera_fx.serving.limits import Limits

LABELS = ("bad", "fair", "good")
KEY = "a key of the tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}


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
    limits = Limits(text=5, upload=200_000, adapters=6, rate=0, changes=0)
    app = create_app(classify, store, LABELS, key=KEY, limits=limits, **options)
    return app, store, model, sizes


@pytest.fixture
def client(world: Any) -> Iterator[TestClient]:
    with TestClient(world[0], headers=HEADERS) as client:
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
    full = client.put("/adapters/more", json=body(source))
    assert (full.status_code, "no room" in full.text) == (409, True)
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


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of a real server; stopped, cleanly, at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def test_a_real_server_mixes_what_waits(world: Any) -> None:
    app, store, _, sizes = world
    questions = [(f"{n % 10}{n // 10}123", f"s{n % 5}") for n in range(24)]

    async def all_at_once(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            return await asyncio.gather(*(ask(client, *question) for question in questions))

    with served(app) as url:
        answers = asyncio.run(all_at_once(url))
    for answer, question in zip(answers, questions, strict=True):
        assert_answer(world, answer, *question)
    assert sum(sizes) == 24
    assert len(sizes) < 24  # requests did share batches
    assert max(sizes) <= 4
    assert len(store.loaded()) <= 4


def test_load_generator_counts_what_was_answered_and_what_was_not(world: Any) -> None:
    with served(world[0]) as url, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, but it never listens
        places = {**{f"s{n}": url for n in range(5)}, "unknown": url}
        places["down"] = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        options = {"clients": 6, "seconds": 60, "requests": 30, "skew": 0.5}
        asked = load.Load(places, texts=("12345", "54321"), **options)
        outcome = load.run(asked)
        figures = outcome.summary()
        lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    answered = len(outcome.latencies)
    assert answered == outcome.by_adapter.total()
    assert answered + outcome.errors.total() == 180
    assert set(outcome.by_adapter) == {f"s{n}" for n in range(5)}
    assert set(outcome.errors) == {"404", "ConnectionRefusedError"}
    assert f'http_responses_total{{status="200"}} {answered}' in lines
    assert f'http_responses_total{{status="404"}} {outcome.errors["404"]}' in lines
    assert figures["requests"] == 180
    assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"] < 60_000
    assert figures["per_second"] == pytest.approx(answered / outcome.seconds)


def test_load_stops_when_its_time_is_over(world: Any) -> None:
    with served(world[0]) as url:
        outcome = load.run(load.Load({"s0": url}, texts=("12345",), clients=2, seconds=0.3))
    assert outcome.seconds >= 0.3
    assert outcome.latencies
    assert not outcome.errors


def test_load_draws_by_zipfs_law() -> None:
    names = dict.fromkeys(["a", "b", "c"], "http://127.0.0.1:1")
    assert load.Load(names, skew=0).weights() == [1, 1, 1]
    assert load.Load(names, skew=1).weights() == [1, 1 / 2, 1 / 3]


class Stress:
    """Clients of many kinds at once, each in a thread of its own, for some seconds.

    Longer on a slow machine: until adapters that come and go were met present and absent.
    """

    def __init__(self, world: Any, url: str, seconds: float) -> None:
        self.url, self.store, self.start = url, world[1], time.monotonic()
        self.seconds = seconds
        with torch.no_grad():
            texts, names = ["12345", "97531"], [f"s{n}" for n in range(3)]
            rows = [(text, name) for text in texts for name in names]
            model = world[2]
            scores = [model(encode([t]), adapter_names=[n])[0].tolist() for t, n in rows]
        self.expected = dict(zip(rows, scores, strict=True))
        self.good = body(self.store.folder / "s1")
        self.hostile = {"config": self.good["config"], "weights": self.good["weights"][:400]}
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.failures: list[BaseException] = []

    def check(self, client: httpx.Client, kind: str, text: str, name: str, like: str) -> None:
        response = ask(client, text, name)
        self.statuses[kind, response.status_code] += 1
        if response.status_code == 200:
            scores = torch.tensor(list(response.json()["scores"].values()))
            assert_close(scores, torch.tensor(self.expected[text, like]), factor=5)

    def steady(self, client: httpx.Client, number: int) -> None:
        text, name = [*self.expected][number % 6]
        self.check(client, "steady", text, name, like=name)

    def fleeting(self, client: httpx.Client, number: int) -> None:
        """Adapters that other clients upload and delete; all hold what s1 holds."""
        self.check(client, "fleeting", "12345", f"t{number % 2}", like="s1")

    def come_and_go(self, client: httpx.Client, number: int) -> None:
        if number:
            delete = client.delete(f"/adapters/t{(number + 1) % 2}")
            self.statuses["delete", delete.status_code] += 1
        put = client.put(f"/adapters/t{number % 2}", json=self.good)
        self.statuses["put", put.status_code] += 1

    def attack(self, client: httpx.Client, number: int) -> None:
        name = ("/adapters/evil", "/adapters/s0", "/adapters/..%2Fs0")[number % 3]
        content = json.dumps(self.hostile) if number % 2 else b"\0" * 250_000
        self.statuses["attack", client.put(name, content=content).status_code] += 1

    def churn(self, client: httpx.Client, number: int) -> None:
        """The same store from another thread, without HTTP."""
        self.store.load(f"s{number % 5}")
        self.store.drop(f"s{(number + 1) % 5}")

    def loop(self, action: Any, start: int) -> None:
        number = start
        try:
            options: Any = {"headers": HEADERS, "trust_env": False, "timeout": 20}
            with httpx.Client(base_url=self.url, **options) as client:
                while not self.is_over():
                    action(client, number)
                    number += 1
        except BaseException as error:
            self.failures.append(error)

    def is_over(self) -> bool:
        taken = time.monotonic() - self.start
        met = all(self.statuses["fleeting", status] for status in (200, 404))
        return bool(self.failures) or taken > (self.seconds if met else 60)

    def run(self) -> None:
        kinds = [self.steady, self.steady, self.steady, self.fleeting, self.fleeting]
        kinds += [self.come_and_go, self.attack, self.churn]
        threads = [
            threading.Thread(target=self.loop, args=(action, start))
            for start, action in zip((0, 1, 2, 0, 1, 0, 0, 0), kinds, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


def test_stress_uploads_deletes_and_attacks_while_it_serves(world: Any) -> None:
    with served(world[0]) as url:
        stress = Stress(world, url, seconds=3.0)
        stress.run()
        for name in ("t0", "t1"):
            httpx.delete(f"{url}/adapters/{name}", headers=HEADERS, trust_env=False)
        health = httpx.get(f"{url}/health", trust_env=False).json()
    if stress.failures:
        raise stress.failures[0]
    found: dict[str, set[int]] = {}
    for kind, status in +stress.statuses:
        found.setdefault(kind, set()).add(status)
    assert found["steady"] == {200}
    assert found["fleeting"] == {200, 404}
    assert found["put"] == {201}
    assert found["delete"] == {204}
    assert found["attack"] <= {400, 404, 409, 413, 422}
    assert stress.statuses["steady", 200] > 10
    assert health == {"status": "ok", "adapters": 5}
    assert [path.name for path in world[1].folder.iterdir() if path.name.startswith(".")] == []
