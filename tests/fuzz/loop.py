"""The loop of the fuzzer: mutate, run, keep what is new, make failures small."""

import collections
import hashlib
import json
import time
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.targets import Fault, Files

MOST = 200_000
"""Bytes of an input to go on from: mutations of mutations grow, and large ones try little in much time."""


def mutations(target: Any, seed: int, count: int, corpus: list[Files] | None = None) -> list[Fault]:
    """Run so many mutated inputs, the same for the same seed.

    Args:
        target: of `tests.fuzz.targets`.
        seed: of all draws.
        count: how many.
        corpus: further files to start from.
    """
    random, faults = Random(seed), list[Fault]()
    seeds = [*target.seeds, *(corpus or ())]
    for _ in range(count):
        files = target.mutate(random, random.choice(seeds), random.choice((1, 1, 1, 2, 3, 6)))
        fault = target.run(files)
        if fault is not None:
            faults.append(fault)
    return faults


def hunt(target: Any, seed: int, seconds: float, out: Path) -> collections.Counter[str]:
    """Run until the time is over; keep failures in ``out``, and some of the other inputs to go on from."""
    random, counts = Random(seed), collections.Counter[str]()
    corpus, end = stored(out / "corpus" / target.name), time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"current-{target.name}").open("wb", buffering=0) as current:
        while time.monotonic() < end:
            # What is refused at once stays so: half of all start from files that are whole.
            start = random.choice(corpus if corpus and random.random() < 0.5 else target.seeds)
            files = target.mutate(random, start, random.choice((1, 1, 1, 2, 3, 6)))
            note(files, current)
            fault = target.run(files)
            counts["mutations"] += 1
            if fault is not None:
                counts["faults"] += 1
                folder = out / "failures" / target.name
                keep({**fault.files, "reason.txt": fault.reason.encode()}, folder, digest(files))
            elif random.random() < 0.002 and sum(map(len, files.values())) < MOST:
                corpus.append(files)
                keep(files, out / "corpus" / target.name, digest(files))
    return counts


def note(files: Files, current: Any) -> None:
    """Write down what is tried now, in case the process crashes: names and sizes in a line, then the bytes.

    Into one open file: to make and open a file for each costs a tenth of the time.
    """
    head = json.dumps({name: len(data) for name, data in files.items()}).encode()
    text = b"\n".join((head, *files.values()))
    current.seek(0)
    current.truncate(current.write(text))


def digest(files: Files) -> str:
    text = json.dumps({name: data.hex() for name, data in sorted(files.items())})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def keep(files: Files, folder: Path, name: str) -> None:
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (path / file).write_bytes(data)


def stored(folder: Path) -> list[Files]:
    """The inputs in a folder, one in each of its folders."""
    if not folder.is_dir():
        return []
    return [
        {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.suffix != ".txt"}
        for path in sorted(folder.iterdir())
    ]
