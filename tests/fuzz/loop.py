"""The loop of the fuzzer: mutate, run, keep what is new, make failures small."""

import collections
import hashlib
import json
import time
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.targets import Fault, Files


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
    seeds, end = [*target.seeds, *stored(out / "corpus" / target.name)], time.monotonic() + seconds
    while time.monotonic() < end:
        files = target.mutate(random, random.choice(seeds), random.choice((1, 1, 1, 2, 3, 6)))
        keep(files, out / "current" / target.name, "input")  # for a crash of the process
        fault = target.run(files)
        counts["mutations"] += 1
        if fault is not None:
            counts["faults"] += 1
            folder = out / "failures" / target.name
            keep({**fault.files, "reason.txt": fault.reason.encode()}, folder, digest(files))
        elif random.random() < 0.002:
            seeds.append(files)
            keep(files, out / "corpus" / target.name, digest(files))
    return counts


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
