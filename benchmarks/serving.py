"""The example server against one process per adapter, on the same cores, under the same load.

python -m benchmarks.serving          # after python -m examples.server.train
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.report import console, resident, write
from examples.server.load import Load, Outcome, run
from examples.server.minilm import DOMAINS
from examples.server.train import datasets

PORT, MANY = 8100, 64


@contextlib.contextmanager
def process(port: int, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process of its own, from when it answers until the end of the block."""
    started = subprocess.Popen([sys.executable, "-m", *command, "--port", str(port)])
    try:
        _wait(port, started)
        yield started
    finally:
        started.send_signal(signal.SIGINT)
        started.wait(30)


def _wait(port: int, started: subprocess.Popen[bytes], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and started.poll() is None:
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server on port {port} did not start")


def many_folder(folder: Path) -> Path:
    """The four adapters under sixty-four names, beside what the server needs."""
    many = folder.parent / "server64"
    for number in range(MANY):
        source = folder / "adapters" / DOMAINS[number % len(DOMAINS)]
        shutil.copytree(source, many / "adapters" / f"c{number}", dirs_exist_ok=True)
    shutil.copytree(folder / "kind", many / "kind", dirs_exist_ok=True)
    return many


def loads(clients: int, seconds: float) -> dict[str, Load]:
    """The same texts and clients for every arrangement of servers."""
    texts = [e.text for d in datasets(250).values() for e in d.held_out]
    own = {domain: f"http://127.0.0.1:{PORT + 1 + n}" for n, domain in enumerate(DOMAINS)}
    places: dict[str, Mapping[str, str]] = {
        "four processes, one adapter each": own,
        "one process, four adapters": dict.fromkeys(DOMAINS, f"http://127.0.0.1:{PORT}"),
        f"one process, {MANY} adapters": {
            f"c{n}": f"http://127.0.0.1:{PORT + 5}" for n in range(MANY)
        },
    }
    options: dict[str, Any] = {"texts": texts, "clients": clients, "seconds": seconds, "skew": 0.5}
    return {name: Load(place, **options) for name, place in places.items()}


def measured(name: str, outcomes: list[Outcome], memory: float) -> dict[str, Any]:
    """Medians over the rounds."""
    found = [outcome.summary() for outcome in outcomes]
    keys = ("per_second", "p50_ms", "p95_ms", "p99_ms")
    return {
        "name": name,
        **{key: median(summary[key] for summary in found) for key in keys},
        "rounds": found,
        "errors": sum(outcome.errors.total() for outcome in outcomes),
        "memory_mib": memory,
    }


def main(
    clients: Annotated[int, typer.Option(min=1)] = 16,
    seconds: Annotated[float, typer.Option(min=1.0, help="of load, each time")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="of each of the four")] = 1,
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    folder: Annotated[Path, typer.Option()] = Path("out/server"),
    output: Annotated[Path, typer.Option()] = Path("out/bench_serving.json"),
) -> None:
    """Start all servers, and load one arrangement after the other; idle ones cost no time."""
    many, found = many_folder(folder), loads(clients, seconds)
    there = ("--device", device)
    one = ("benchmarks.one_adapter", "--folder", str(folder), "--threads", str(threads), *there)
    with contextlib.ExitStack() as stack:
        four = [
            stack.enter_context(process(PORT + 1 + n, *one, "--adapter", domain))
            for n, domain in enumerate(DOMAINS)
        ]
        mixed = [
            stack.enter_context(
                process(port, "examples.server", "--folder", str(place), "--rate", "0", *there)
            )
            for port, place in ((PORT, folder), (PORT + 5, many))
        ]
        groups = dict(zip(found, (four, mixed[:1], mixed[1:]), strict=True))
        for load in found.values():
            run(Load(load.places, load.texts, clients, seconds=2.0))
        outcomes: dict[str, list[Outcome]] = {name: [] for name in found}
        for _ in range(rounds):
            for name, load in found.items():
                outcomes[name].append(run(load))
        memory = {n: sum(resident(p.pid) for p in ps) / 2**20 for n, ps in groups.items()}
    rows = [measured(name, outcomes[name], memory[name]) for name in found]
    table = Table("", "answers/s", "p50 ms", "p95 ms", "p99 ms", "MiB", "errors")
    for row in rows:
        times = (f"{row[key]:.0f}" for key in ("per_second", "p50_ms", "p95_ms", "p99_ms"))
        table.add_row(row["name"], *times, f"{row['memory_mib']:.0f}", str(row["errors"]))
    console.print(table)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    each = rows[0]["memory_mib"] / len(DOMAINS)
    console.print(f"{MANY} processes would need {MANY * each:.0f} MiB; there are {total:.0f}")
    write(
        output,
        {
            "clients": clients,
            "seconds": seconds,
            "threads": threads,
            "device": device,
            "servers": rows,
        },
    )


if __name__ == "__main__":
    typer.run(main)
