"""The bounds of the example server: what a client cannot take, however it asks."""

import asyncio
import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import torch
import typer
import uvicorn
from fastapi.testclient import TestClient

from examples.server import __main__ as command
from tests.checkpoint.test_store import CONFIG, WEIGHTS, make
from tests.examples.test_server import HEADERS, KEY, LABELS, ask, body, encode
from tests.fuzz import mutators
from vera_fx.serving import app as server_app
from vera_fx.serving.app import create_app
from vera_fx.serving.door import server_options
from vera_fx.serving.gate import Rate, address_of
from vera_fx.serving.limits import Limits


class World:
    """A model with two stored adapters, and applications over it."""

    def __init__(self, folder: Path) -> None:
        self.model, self.store, _ = make(folder, 2)
        self.release = threading.Event()
        self.release.set()

    def classify(self, texts: Any, names: Any) -> list[list[float]]:
        self.release.wait(30)
        with torch.no_grad():
            rows = encode([[ord(c) % 10 for c in f"{text:5}"] for text in texts])
            return self.model(rows, adapter_names=list(names)).tolist()

    def app(self, *, key: str | None = KEY, **limits: Any) -> Any:
        given = Limits(**{"text": 5, "rate": 0, "changes": 0, **limits})
        return create_app(self.classify, self.store, LABELS, key=key, limits=given, max_batch=2)

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[TestClient]:
        with TestClient(self.app(**options), headers=HEADERS) as client:
            yield client


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "adapters")


@contextlib.contextmanager
def listening(app: Any, **limits: Any) -> Iterator[int]:
    """The port of a real server with the bounds on its connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {**server_options(Limits(**limits)), "log_level": "critical"}
    server = uvicorn.Server(uvicorn.Config(app, port=port, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def opened(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(data)
    return connection


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    found = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while data := connection.recv(4096):
            found += data
    return found


def test_uploads_and_deletes_need_the_key(world: World) -> None:
    good = body(world.store.folder / "s0")
    with world.client() as client:
        for headers in ({}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
            client.headers = httpx.Headers(headers)
            refused = client.put("/adapters/new", json=good)
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert client.delete("/adapters/s0").status_code == 401
            assert client.post("/adapters/s0", json=good).status_code == 401
        assert ask(client, "12345", "s0").status_code == 200
        client.headers = httpx.Headers(HEADERS)
        assert client.put("/adapters/new", json=good).status_code == 201
        assert client.delete("/adapters/new").status_code == 204
    with world.client(key=None) as client:
        for headers in ({}, {"Authorization": "Bearer None"}, HEADERS):
            assert client.put("/adapters/new", json=good, headers=headers).status_code == 403
        assert client.delete("/adapters/s0").status_code == 403
    assert world.store.names() == ["s0", "s1"]


def test_a_key_that_can_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERA_FX_SERVER_KEY", "secret")
    with pytest.raises(typer.BadParameter, match="fewer than 16 characters"):
        command.main()


def test_rate_of_an_address(world: World) -> None:
    with world.client(rate=0.01, burst=3) as client:
        statuses = [ask(client, "12345", "s0").status_code for _ in range(5)]
        late = client.get("/health")
        assert statuses == [200, 200, 200, 429, 429]
        assert late.status_code == 429
        assert 0 < int(late.headers["Retry-After"]) <= 100
        other = TestClient(client.app, client=("10.0.0.1", 1))
        assert other.get("/health").status_code == 200
    with world.client(changes=0.1, key="another") as client:  # guesses are bounded, too
        statuses = [client.delete("/adapters/s0").status_code for _ in range(4)]
        assert statuses == [401, 401, 429, 429]
        assert ask(client, "12345", "s0").status_code == 200


def test_tokens_come_back_and_addresses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("vera_fx.serving.gate.time.monotonic", lambda: now[0])
    rate = Rate(2.0, 4)
    assert [rate.take("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    now[0] = 0.5
    assert [rate.take("a") for _ in range(2)] == [0, 0.5]
    now[0] = 1e6
    assert [rate.take("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    for number in range(20_000):
        rate.take(str(number))
    assert len(rate._known) == 10_000


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_addresses(host: str, address: str) -> None:
    assert address_of({"client": (host, 1)}) == address
    assert address_of({"client": None}) == ""


def test_bodies_are_bounded_before_and_while_they_are_read(world: World) -> None:
    def chunks() -> Iterator[bytes]:
        while True:
            read.append(1)
            yield b" " * 1000

    with world.client(body=2_000, upload=5_000) as client:
        for method, path, most in (("POST", "/classify", 2), ("PUT", "/adapters/new", 5)):
            read: list[int] = []
            assert client.request(method, path, content=b" " * 6_000).status_code == 413
            with contextlib.suppress(
                MemoryError
            ):  # TestClient reads all of it, the server does not
                content = (b"x" * 1000 for _ in range(most + 1))
                assert client.request(method, path, content=content).status_code == 413
        for length, status in (
            ("9" * 5_000, 413),
            ("9" * 9, 413),
            ("-1", 400),
            ("1_0", 400),
            ("x", 400),
        ):
            headers = {"content-length": length}
            assert client.post("/classify", content=b"", headers=headers).status_code == status
        sent = {"text": "12345", "adapter": "s0"}
        assert client.post("/classify", json=sent).status_code == 200
    with listening(world.app(body=2_000), head_seconds=0.4) as port:
        head = b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n"
        assert b" 413 " in received(opened(port, head)).splitlines()[0]  # and it was closed
        head = b"POST /classify HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        endless = opened(port, head)
        with contextlib.suppress(OSError):  # closed in the midst of it
            for chunk in chunks():
                endless.sendall(b"3e8\r\n" + chunk + b"\r\n")
                time.sleep(0.01)
        assert len(read) < 1_000


def test_bodies_that_never_end(world: World) -> None:
    head = b"PUT /adapters/new HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\nauthorization: Bearer "
    head += KEY.encode() + b"\r\n\r\n{"
    with listening(world.app(body_seconds=0.3), head_seconds=0.4) as port:
        slow = [opened(port, head) for _ in range(3)]
        answers = [received(connection) for connection in slow]
        assert {answer.split(b"\r\n")[0] for answer in answers} <= {
            b"HTTP/1.1 408 Request Timeout",
            b"HTTP/1.1 503 Service Unavailable",  # two uploads at a time
        }
        assert any(b"408" in answer for answer in answers)
        alive = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
    assert alive.json() == {"status": "ok", "adapters": 2}


def test_connections_that_ask_nothing_are_closed(world: World) -> None:
    parts = (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\nx-more: ")
    with listening(world.app(), head_seconds=0.4) as port:
        start = time.monotonic()
        silent = [opened(port, part) for part in parts for _ in range(20)]
        url = f"http://127.0.0.1:{port}/health"
        assert httpx.get(url, trust_env=False).status_code == 200  # beside them
        second = opened(port, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he")
        assert b" 200 " in received(second).splitlines()[0]
        for connection in silent:
            assert received(connection) == b""
        assert time.monotonic() - start < 10


def test_connections_are_counted(world: World) -> None:
    for limits in ({"connections": 5}, {"per_client": 5}):
        with listening(world.app(), head_seconds=60, **limits) as port:
            kept = [opened(port) for _ in range(5)]
            time.sleep(0.2)
            for _ in range(3):
                assert received(opened(port, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")) == b""
            for connection in kept:
                connection.close()
            time.sleep(0.2)
            url = f"http://127.0.0.1:{port}/health"
            assert httpx.get(url, trust_env=False).status_code == 200


def test_answers_are_given_up_and_questions_that_wait_are_counted(world: World) -> None:
    world.release.clear()
    app = world.app(answer_seconds=0.5, waiting=2)

    async def crowd() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
        ):
            answers = await asyncio.gather(*(ask(client, "12345", "s0") for _ in range(12)))
            world.release.set()
            after = await ask(client, "12345", "s0")
            while after.status_code in {503, 504}:  # what was held up is captured first
                await asyncio.sleep(0.1)
                after = await ask(client, "12345", "s0")
        return [*sorted(answer.status_code for answer in answers), after.status_code]

    *statuses, after = asyncio.run(crowd())
    assert set(statuses) == {503, 504}
    assert after == 200


def test_uploads_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "add", lambda *_: time.sleep(0.5))
    app, good = world.app(uploads=2), body(world.store.folder / "s0")

    async def crowd() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", headers=HEADERS
        ) as client:
            puts = [client.put(f"/adapters/n{number}", json=good) for number in range(6)]
            return sorted(answer.status_code for answer in await asyncio.gather(*puts))

    assert asyncio.run(crowd()) == [201, 201, 503, 503, 503, 503]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "(.*)*(.*)*X"},
        {"target_modules": ["(.*)*(.*)*X"]},
        {"modules_to_save": ["(.*)*(.*)*X"]},
        {"modules_to_save": "head"},
        {"layers_pattern": ["(a+)+$"], "layers_to_transform": [0]},
        {"layers_pattern": "(a+)+$", "layers_to_transform": [0]},
        {"exclude_modules": ".*"},
        {"target_modules": [f"n{number}" for number in range(1001)]},
        {"target_modules": ["x" * 1001]},
        {"target_modules": [["first"]]},
        {"target_modules": {"first": 1}},
    ],
    ids=str,
)
def test_no_expressions_and_few_names(world: World, changes: dict[str, Any]) -> None:
    with world.client() as client:
        sent = body(world.store.folder / "s0", **changes)
        start = time.process_time()
        assert client.put("/adapters/new", json=sent).status_code == 422
        assert time.process_time() - start < 5
    assert world.store.names() == ["s0", "s1"]


BODIES = {
    "surrogate text": b'{"text": "\\ud800", "adapter": "s0"}',
    "surrogate name": b'{"text": "12345", "adapter": "\\ud800"}',
    "surrogate key": b'{"\\ud800": "12345", "adapter": "s0"}',
    "zero in a name": b'{"text": "12345", "adapter": "s0\\u0000"}',
    "not a number": b'{"text": NaN, "adapter": "s0"}',
    "infinite": b'{"text": "12345", "adapter": Infinity}',
    "long number": b'{"text": ' + b"1" * 5000 + b', "adapter": "s0"}',
    "deep": b"[" * 60_000,
    "deep text": b'{"text": ' + b"[" * 30_000 + b"]" * 30_000 + b', "adapter": "s0"}',
    "no unicode": b'{"text": "\xff", "adapter": "s0"}',
    "a list": b"[]",
    "nothing": b"",
    "null": b"null",
    "wrong kinds": b'{"text": {"a": 1}, "adapter": ["s0"]}',
    "UTF-16": '{"text": "12345", "adapter": "s0"}'.encode("utf-16"),
}


@pytest.mark.parametrize("case", BODIES)
def test_malformed_bodies_are_the_clients_fault(world: World, case: str) -> None:
    with world.client() as client:
        for kind in ("application/json", "text/plain", "", "multipart/form-data"):
            headers = {"content-type": kind}
            answer = client.post("/classify", content=BODIES[case], headers=headers)
            assert 400 <= answer.status_code < 500 or case == "UTF-16"
            assert len(answer.content) < 3000  # nothing is repeated
            answer = client.put("/adapters/new", content=BODIES[case], headers=headers)
            assert 400 <= answer.status_code < 500
        assert ask(client, "12345", "s0").status_code == 200


def test_mutated_bodies_never_end_in_500(world: World) -> None:
    random, sends = Random(0), {"content-type": "application/json"}
    question = json.dumps({"text": "12345", "adapter": "s0"}).encode()
    upload = json.dumps(body(world.store.folder / "s0")).encode()
    with world.client() as client:
        found = {(client.put("/adapters/new", content=upload)).status_code}
        client.delete("/adapters/new")
        for _ in range(300):
            sent = mutators.json_text(random, question, random.choice((1, 2)))
            answer = client.post("/classify", content=sent, headers=sends)
            found.add(answer.status_code)
            sent = mutators.json_text(random, upload, random.choice((1, 2)))
            answer = client.put("/adapters/new", content=sent, headers=sends)
            if answer.status_code == 201:
                client.delete("/adapters/new")
            found.add(answer.status_code)
    assert {200, 201, 422} <= found <= {200, 201, 400, 404, 409, 413, 422}


@pytest.mark.parametrize("name", ["%00", "a%2Fb", "con", "x" * 300, "%F0%9F%A4%96" * 70, "%20a"])
def test_names_in_addresses(world: World, name: str) -> None:
    with world.client() as client:
        sent = body(world.store.folder / "s0")
        assert client.put(f"/adapters/{name}", json=sent).status_code in {400, 404}
        assert client.delete(f"/adapters/{name}").status_code == 404
    assert world.store.names() == ["s0", "s1"]


def test_values_that_are_no_numbers(world: World, tmp_path: Path) -> None:
    """Neither uploaded nor, where an operator let them in, answered."""
    from safetensors.torch import load_file, save_file

    source = world.store.folder / "s0"
    state = load_file(source / WEIGHTS)
    for tensor in state.values():
        tensor.fill_(float("nan"))
    save_file(state, tmp_path / WEIGHTS)
    sent = {
        "config": json.loads((source / CONFIG).read_text()),
        "weights": base64.b64encode((tmp_path / WEIGHTS).read_bytes()).decode(),
    }
    with world.client() as client:
        assert client.put("/adapters/new", json=sent).status_code == 422
        world.classify = lambda texts, names: [[float("nan")] * 3] * len(texts)
    with world.client() as client:
        assert ask(client, "12345", "s0").status_code == 422


def test_a_full_disk_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server_app, "add", full)
    with world.client() as client:
        answer = client.put("/adapters/new", json=body(world.store.folder / "s0"))
    assert answer.status_code == 507


def test_no_pages_of_the_framework(world: World) -> None:
    with world.client() as client:
        for path in ("/docs", "/redoc", "/openapi.json", "/adapters", "/"):
            assert client.get(path).status_code == 404


def test_the_defaults_hold_what_the_limits_say() -> None:
    limits = Limits()
    assert 12 * limits.text < limits.body  # every character escaped
    assert limits.per_client <= limits.connections
