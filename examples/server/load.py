"""Asks a server from many clients at once and says how it did: python -m examples.server.load.

Each client waits for its answer before it asks again, over a connection that it keeps. Adapters are
drawn by Zipf's law, as customers are: a few are asked for often, most seldom.
"""

import http.client
import json
import random
import statistics
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

TEXTS = (
    "A wonderful film.",
    "The battery died after two days and nobody answered my mails.",
    "Not bad, but I have seen better ones by the same people, and for less money.",
    "ok",
    "What a day: the train was late, the coffee cold, and still I could not stop smiling!",
)


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        places: for each adapter, the address of the server that has it, ``http://host:port``.
        texts: drawn from evenly.
        clients: how many ask at once.
        seconds: for how long.
        requests: most requests of each client; 0 for no bound.
        skew: exponent of Zipf's law; 0 asks for all adapters equally often.
        timeout: seconds after which a client gives a request up.
        header: of a header that carries the adapter's name too; none if empty.
        seed: of all draws.
    """

    places: Mapping[str, str]
    texts: Sequence[str] = TEXTS
    clients: int = 16
    seconds: float = 10.0
    requests: int = 0
    skew: float = 1.0
    timeout: float = 30.0
    header: str = ""
    seed: int = 0

    def weights(self) -> list[float]:
        """How often each adapter is asked for, in the order of `places`."""
        return [1 / (rank + 1) ** self.skew for rank in range(len(self.places))]


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        seconds: how long it took, the last answers included.
        latencies: seconds of every request that was answered with 200.
        by_adapter: how many of them asked for each adapter.
        errors: all other requests, by status or by kind of failure.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    by_adapter: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Counts, requests per second, and milliseconds that half, 95 % and 99 % stayed within."""
        found = self.latencies
        cuts = statistics.quantiles(found, n=100) if len(found) > 1 else [float("nan")] * 99
        return {
            "requests": len(found) + self.errors.total(),
            "errors": dict(self.errors),
            "per_second": len(found) / self.seconds if self.seconds else 0.0,
            **{f"p{q}_ms": 1e3 * cuts[q - 1] for q in (50, 95, 99)},
        }


def run(load: Load) -> Outcome:
    """Ask until the time is over or all was asked; what was asked by then is waited for."""
    outcome, lock = Outcome(), threading.Lock()
    start = time.perf_counter()
    clients = [
        threading.Thread(target=_client, args=(load, number, start + load.seconds, outcome, lock))
        for number in range(load.clients)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    outcome.seconds = time.perf_counter() - start
    return outcome


def _client(load: Load, number: int, end: float, outcome: Outcome, lock: threading.Lock) -> None:
    draws, names, weights = (
        random.Random(load.seed * 10_007 + number),
        [*load.places],
        load.weights(),
    )
    connections: dict[str, http.client.HTTPConnection] = {}
    left = load.requests or sys.maxsize
    while (asked := time.perf_counter()) < end and left > 0:
        left -= 1
        (name,) = draws.choices(names, weights)
        error = _ask(connections, load, name, draws.choice(load.texts))
        taken = time.perf_counter() - asked
        with lock:
            if error is None:
                outcome.latencies.append(taken)
                outcome.by_adapter[name] += 1
            else:
                outcome.errors[error] += 1
        if error is not None:  # do not hammer a server that is down or full
            time.sleep(0.01)
    for connection in connections.values():
        connection.close()


def _ask(
    connections: dict[str, http.client.HTTPConnection], load: Load, adapter: str, text: str
) -> str | None:
    """What went wrong, or None."""
    place = load.places[adapter]
    if place not in connections:
        host = urllib.parse.urlsplit(place).netloc
        connections[place] = http.client.HTTPConnection(host, timeout=load.timeout)
    body = json.dumps({"text": text, "adapter": adapter})
    headers = {"content-type": "application/json"} | ({load.header: adapter} if load.header else {})
    try:
        connections[place].request("POST", "/classify", body, headers)
        response = connections[place].getresponse()
        response.read()
    except (OSError, http.client.HTTPException) as error:
        connections.pop(place).close()
        return type(error).__name__
    return None if response.status == http.HTTPStatus.OK else str(response.status)


def main(
    url: str = "http://127.0.0.1:8000",
    adapters: Annotated[
        str, typer.Option(help="separated by commas")
    ] = "movies,news,products,tweets",
    clients: Annotated[int, typer.Option(min=1)] = 16,
    seconds: Annotated[float, typer.Option(min=0.1)] = 10.0,
    skew: Annotated[float, typer.Option(min=0.0, help="0 for equally often")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Ask a running server, and print throughput, latencies and errors."""
    outcome = run(
        Load(dict.fromkeys(adapters.split(","), url), clients=clients, seconds=seconds, skew=skew)
    )
    figures = outcome.summary()
    table = Table("answers/s", "p50 ms", "p95 ms", "p99 ms", "requests", "errors")
    times = [f"{figures[key]:.1f}" for key in ("per_second", "p50_ms", "p95_ms", "p99_ms")]
    table.add_row(*times, str(figures["requests"]), str(figures["errors"] or 0))
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
