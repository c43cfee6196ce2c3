"""Two replicas over one folder by Ray Serve: the answers of the process itself. `make test-ray` brings Ray."""

import base64
import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="Ray is an extra of its own: make test-ray")

from ray import serve
from transformers import AutoModelForSequenceClassification

from deploy.ray_serve import NAME, Options, app
from tests.deploy import worlds
from tests.deploy.conftest import KEY, ROOT
from vera_fx.errors import ConfigError

PORT = 8437
HEADERS = {"Authorization": f"Bearer {KEY}"}
LIMITS = {"rate": 0, "changes": 0, "text": 60}
ADAPTERS = ("a0", "a1", "a2")


@pytest.fixture(scope="module")
def judged(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folders of a classifier that two replicas serve."""
    root = worlds.classifier(tmp_path_factory.mktemp("judged"), 3)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    made = app(Options(model=root / "model", store=root / "store", cpus=0.25, limits=LIMITS))
    serve.run(made, name="judged", route_prefix="/")
    yield root
    serve.shutdown()


def address(path: str) -> str:
    return f"http://127.0.0.1:{PORT}{path}"


def ask(text: str, adapter: str, **headers: str) -> httpx.Response:
    body = {"text": text, "adapter": adapter}
    return httpx.post(address("/classify"), json=body, headers=headers, timeout=60)


def ask_many(questions: list[tuple[str, str]], **headers: str) -> list[httpx.Response]:
    """Twelve at a time, so that replicas find some to put into a batch."""
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        return list(pool.map(lambda asked: ask(*asked, **headers), questions))


def assert_scores(answer: httpx.Response, expected: list[float]) -> None:
    assert answer.status_code == 200, answer.text
    assert list(answer.json()["scores"]) == list(worlds.LABELS)
    assert list(answer.json()["scores"].values()) == pytest.approx(expected, abs=1e-5)


def by_all(text: str, adapter: str) -> list[httpx.Response]:
    """Answers to one question, of both replicas."""
    found: list[httpx.Response] = []
    while len({answer.headers["x-replica"] for answer in found}) < 2:
        assert len(found) < 400
        found += ask_many([(text, adapter)] * 12)
    return found


def test_both_replicas_answer_what_the_process_itself_does(judged: Path) -> None:
    questions = [(text, name) for text in worlds.TEXTS for name in ADAPTERS]
    expected = {asked: worlds.scores(judged, asked[1], asked[0]) for asked in questions}
    assert len({round(row[0], 3) for row in expected.values()}) == len(questions)

    answers = ask_many(questions * 12)

    for asked, answer in zip(questions * 12, answers, strict=True):
        assert_scores(answer, expected[asked])
    replicas = Counter(answer.headers["x-replica"] for answer in answers)
    assert len(replicas) == 2
    assert min(replicas.values()) > 10
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(address("/metrics")).text.splitlines())
    assert int(lines["rows_total"]) > int(lines["batches_total"]) > 0  # texts shared batches


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        ({"text": "x", "adapter": "nobody"}, 404, "no such adapter"),
        ({"text": "x", "adapter": "../store/a0"}, 404, "no such adapter"),
        ({"text": "x", "adapter": "__base__"}, 404, "no such adapter"),
        ({"text": "x" * 61, "adapter": "a0"}, 413, "more than 60 characters"),
        ({"text": "", "adapter": "a0"}, 422, "at least 1 character"),
        ({"text": "x"}, 422, "required"),
        ({"text": "x" * 70_000, "adapter": "a0"}, 413, "at most 65536 bytes"),
    ],
)
def test_bad_questions(judged: Path, sent: dict[str, str], status: int, words: str) -> None:
    for name in (None, sent.get("adapter", "a0"), "x" * 5000):
        headers = {"serve_multiplexed_model_id": name} if name else {}
        answer = httpx.post(address("/classify"), json=sent, headers=headers)
        assert (answer.status_code, words in answer.text) == (status, True), answer.text
    assert_scores(ask("?", "a1"), worlds.scores(judged, "a1", "?"))


def test_the_folder_is_followed_by_both(judged: Path) -> None:
    kind = AutoModelForSequenceClassification
    for answer in by_all("a fine film", "late"):
        assert answer.status_code == 404
    seen = []
    for scale in (0.8, 1.9):  # new, then saved over
        worlds.save(judged, kind, "late", scale)
        seen.append(worlds.scores(judged, "late", "a fine film"))
        for answer in by_all("a fine film", "late"):
            assert_scores(answer, seen[-1])
    assert seen[0] != pytest.approx(seen[1], abs=1e-3)
    shutil.rmtree(judged / "store" / "late")
    for answer in by_all("a fine film", "late"):
        assert answer.status_code == 404


def test_an_upload_to_one_serves_from_both(judged: Path, tmp_path: Path) -> None:
    worlds.save(judged, AutoModelForSequenceClassification, "source", 2.6)
    source = (judged / "store" / "source").rename(tmp_path / "source")
    weights = base64.b64encode((source / "adapter_model.safetensors").read_bytes()).decode()
    config = json.loads((source / "adapter_config.json").read_text())
    body = {"config": config, "weights": weights}
    for given, status in (({}, 401), (HEADERS, 201), (HEADERS, 409)):
        answer = httpx.put(address("/adapters/sent"), json=body, headers=given, timeout=60)
        assert answer.status_code == status, answer.text
    expected = worlds.scores(judged, "sent", "?")
    for answer in by_all("?", "sent"):
        assert_scores(answer, expected)
    assert httpx.delete(address("/adapters/sent"), headers=HEADERS).status_code == 204
    for answer in by_all("?", "sent"):
        assert answer.status_code == 404


def test_a_header_chooses_the_replica_and_the_body_the_adapter(judged: Path) -> None:
    expected = worlds.scores(judged, "a2", "?")
    ask("?", "a2", serve_multiplexed_model_id="a1")
    time.sleep(1)  # until the router knows who has it
    answers = [ask("?", "a2", serve_multiplexed_model_id="a1") for _ in range(30)]
    for answer in answers:
        assert_scores(answer, expected)
    assert len({answer.headers["x-replica"] for answer in answers}) == 1
    assert len({ask("?", "a2").headers["x-replica"] for _ in range(60)}) == 2


def test_a_killed_replica_is_missed_by_nobody_who_asks_later(cluster: Any, judged: Path) -> None:
    expected = worlds.scores(judged, "a1", "?")
    before = {answer.headers["x-replica"] for answer in by_all("?", "a1")}
    victim = min(before)
    actors = cluster.util.list_named_actors(all_namespaces=True)
    (found,) = (actor for actor in actors if actor["name"].endswith(f"{NAME}#{victim}"))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        meanwhile = [pool.submit(ask, "?", "a1") for _ in range(200)]
        while sum(future.done() for future in meanwhile) < 20:
            time.sleep(0.01)
        cluster.kill(cluster.get_actor(found["name"], namespace=found["namespace"]))
        for answer in ask_many([("?", "a1")] * 60):
            assert_scores(answer, expected)
    for answer in (future.result() for future in meanwhile):
        if answer.status_code != 500:  # of those that the killed one was answering
            assert_scores(answer, expected)
    assert sum(future.result().status_code == 500 for future in meanwhile) <= 8

    end = time.monotonic() + 90
    while (after := {ask("?", "a1").headers["x-replica"] for _ in range(40)}) <= before:
        assert time.monotonic() < end, "no replica came in the place of the killed one"
        time.sleep(0.5)
    assert victim not in after
    for answer in by_all("?", "a1"):
        assert_scores(answer, expected)


def test_an_embedder_under_a_prefix(judged: Path, tmp_path: Path) -> None:
    root = worlds.embedder(tmp_path, 2)
    limits = {"rate": 0.001, "burst": 2}
    options = {"model": root / "model", "store": root / "store", "limits": limits}
    made = app(Options(**options, replicas=1, cpus=0.25))
    serve.run(made, name="embeds", route_prefix="/vectors")
    texts = list(worlds.TEXTS[::2])
    asked = {"inputs": texts, "adapter": "a1"}

    answer = httpx.post(address("/vectors/embed"), json=asked, timeout=60)
    other = {"input": texts, "model": "a0"}
    openai = httpx.post(address("/vectors/v1/embeddings"), json=other, timeout=60)
    often = httpx.post(address("/vectors/embed"), json=asked, timeout=60)
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as neighbour:
        elsewhere = neighbour.post(address("/vectors/embed"), json=asked, timeout=60)
    serve.delete("embeds")

    assert answer.status_code == openai.status_code == 200, (answer.text, openai.text)
    assert (often.status_code, elsewhere.status_code) == (429, 200)  # each address has a rate
    assert elsewhere.json() == answer.json()
    listed = [entry["embedding"] for entry in openai.json()["data"]]
    for name, found in (("a1", answer.json()), ("a0", listed)):
        for text, one in zip(texts, found, strict=True):
            assert one == pytest.approx(worlds.vector(root, name, text), abs=1e-5)
    assert listed[0] != pytest.approx(answer.json()[0], abs=1e-2)


def test_options_as_a_command_line_gives_them(tmp_path: Path) -> None:
    given = {"model": "m", "store": "s", "replicas": "3", "limits": '{"text": 7, "rate": 0.5}'}
    options = Options.model_validate(given)
    assert (options.replicas, options.model) == (3, Path("m").absolute())
    assert (options.bounds().text, options.bounds().rate) == (7, 0.5)
    assert (options.batch, Options(model="m", store="s", capacity=9).batch) == (32, 9)
    with pytest.raises(ConfigError, match="no limit 'rat'; known: text, inputs"):
        app(Options(model=tmp_path, store=tmp_path, limits={"rat": 1}))
    with pytest.raises(ValueError, match="replica\n.*not permitted"):
        Options.model_validate({**given, "replica": 3})


def test_from_a_shell_with_a_configuration_file(judged: Path, tmp_path: Path) -> None:
    port, names = PORT + 1, ("model", "store")
    given = {name: os.path.relpath(judged / name, ROOT) for name in names}
    application = {
        "name": "shell",
        "route_prefix": "/",
        "import_path": "deploy.ray_serve:app",
        "args": {**given, "replicas": 2, "cpus": 0.25},
        "deployments": [{"name": NAME, "num_replicas": 1}],
    }
    listen = {"host": "127.0.0.1", "port": port}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"http_options": listen, "applications": [application]}))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        answer = until_answered(f"http://127.0.0.1:{port}/classify", process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert_scores(answer, worlds.scores(judged, "a2", "?"))


def until_answered(address: str, process: subprocess.Popen[bytes]) -> httpx.Response:
    """The first answer that is the application's own: until it runs, Ray knows no such path."""
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(address, json={"text": "?", "adapter": "a2"}, timeout=30)
            if answer.status_code == 200:
                return answer
        time.sleep(0.5)
    raise TimeoutError(address)


def test_a_wrong_folder_is_said_where_one_deploys(judged: Path, tmp_path: Path) -> None:
    made = app(Options(model=judged / "model", store=tmp_path, replicas=1, cpus=0.25))
    with pytest.raises(RuntimeError, match="failed"):
        serve.run(made, name="wrong", route_prefix="/wrong")
    message = serve.status().applications["wrong"].deployments[NAME].message
    serve.delete("wrong")
    assert "holds no adapter; give a folder" in message
