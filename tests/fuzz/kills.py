"""Writers that are killed at random moments: what they leave is what one of their saves wrote, whole.

python -m tests.fuzz.kills <kills> <seed> <folder> <kinds>: forks writers from one process that has
everything imported, kills each after some milliseconds, and looks at what is there. A line for each kind
says how many kills there were, how many readings beside the writers, and which save was the last.
"""

import contextlib
import itertools
import json
import mmap
import os
import signal
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

import vera_fx
from tests.helpers import vectors_of
from tests.models import MLP

RANKS = (2, 3, 5)
"""Save number n has rank ``RANKS[n % 3]`` and the value n everywhere, so that mixtures show."""


class Folder:
    """One adapter that is saved over itself again and again.

    Attributes:
        path: where.
        done: the number of the last save that came to an end, shared with the writers.
    """

    writers = 1

    def __init__(self, path: Path) -> None:
        self.path, self.done = path / "adapter", mmap.mmap(-1, 8)
        self.models: list[Any] = []
        for rank in RANKS:
            targets = ["lin0", "lin1"] if rank == 2 else ["lin0"]
            config = vera_fx.VeraConfig(r=rank, target_modules=targets)
            self.models.append(vera_fx.adapt(MLP(), config))
        self.save(0)

    def save(self, number: int) -> None:
        model = self.models[number % 3]
        for value in vectors_of(model).values():
            value.data.fill_(float(number))
        vera_fx.save_adapter(model, self.path)
        self.done[:] = struct.pack("<q", number)

    def pace(self) -> float:
        """Seconds in which a writer is made and saves, here and now."""
        start, before = time.monotonic(), self.last()
        with writing(self) as (pid, *_):
            while self.last() < before + 3:
                time.sleep(0.001)
                if os.waitpid(pid, os.WNOHANG)[0]:
                    raise AssertionError("a writer has failed")
        return time.monotonic() - start

    def write(self, writer: int) -> None:
        """Save for ever; further writers count on their own."""
        for number in itertools.count(self.last() + 1 + 1000 * writer):
            self.save(number)

    def last(self) -> int:
        return struct.unpack("<q", self.done[:])[0]

    def check(self) -> None:
        """Refuse what is no save, or an older one than was said to be there."""
        before = self.last()
        number = number_in(vera_fx.load_adapter(MLP(), self.path))
        if self.writers == 1 and number < before:
            raise AssertionError(f"save {before} had come to an end, and {number} is there")

    def tidy(self) -> None:
        """Save once more: nothing of the killed is left, and PEFT's own file is up to date."""
        self.save(self.last() + 1)
        names = {path.name for path in self.path.iterdir()}
        expected = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        if names != expected:
            raise AssertionError(f"left behind: {sorted(names - expected)}")
        values = json.loads((self.path / "adapter_config.json").read_text())
        if values["r"] != RANKS[self.last() % 3]:
            raise AssertionError("the configuration is an older one")


class TwoWriters(Folder):
    """The same from two processes at once."""

    writers = 2


class Store(Folder):
    """Adapters that are added to a store and deleted from it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        model = vera_fx.adapt(MLP(), vera_fx.VeraConfig(r=2, target_modules=["lin0", "lin1"]))
        self.store = vera_fx.AdapterStore(model, path / "store")
        self.save(0)
        self.store.add("kept", self.path)

    def write(self, writer: int) -> None:
        for number in itertools.count():
            name = f"n{number % 3}"
            if name in self.store.names():
                self.store.delete(name)
            self.store.add(name, self.path)
            self.done[:] = struct.pack("<q", self.last() + 1)

    def check(self) -> None:
        if "kept" not in self.store:
            raise AssertionError("an adapter is gone that nobody deleted")
        for name in self.store.names():
            self.store.drop(name)
            with contextlib.suppress(vera_fx.AdapterError):  # it was deleted just now
                self.store.load(name)

    def tidy(self) -> None:
        for name in self.store.names():
            self.store.delete(name)
        self.store.add("n0", self.path)
        names = {path.name for path in self.store.folder.iterdir()}
        if names != {"n0"}:
            raise AssertionError(f"left behind: {sorted(names)}")


class Program(Folder):
    """An exported program that is saved over itself."""

    def __init__(self, path: Path) -> None:
        self.path, self.done = path / "programs" / "p.pt2", mmap.mmap(-1, 8)
        model = vera_fx.adapt(MLP().eval(), vera_fx.VeraConfig(r=2, target_modules=["lin0"]))
        self.program = vera_fx.export_program(model, (torch.ones(2, 10),), form="constant")
        self.save(0)

    def save(self, number: int) -> None:
        self.program.state_dict["vera.lin0.vera_lambda_d"].fill_(float(number))
        vera_fx.save_program(self.program, self.path)
        self.done[:] = struct.pack("<q", number)

    def check(self) -> None:
        before = self.last()
        found = vera_fx.load_program(self.path).state_dict["vera.lin0.vera_lambda_d"]
        if found[0] < before or not (found == found[0]).all():
            raise AssertionError(f"save {before} had come to an end, and {found} is there")

    def tidy(self) -> None:
        self.save(self.last() + 1)
        names = [path.name for path in self.path.parent.iterdir()]
        if names != ["p.pt2"]:
            raise AssertionError(f"left behind: {sorted(names)}")


KINDS: dict[str, Callable[[Path], Folder]] = {
    "folder": Folder,
    "two writers": TwoWriters,
    "store": Store,
    "program": Program,
}


def number_in(model: Any) -> int:
    """Which save a loaded adapter is.

    Raises:
        AssertionError: it is a mixture.
    """
    values = {float(value) for tensor in vectors_of(model).values() for value in tensor.flatten()}
    if len(values) != 1:
        raise AssertionError(f"values of several saves: {sorted(values)}")
    number = int(values.pop())
    if model.vera.adapters["default"].config.r != RANKS[number % 3]:
        raise AssertionError(f"save {number} with the configuration of another")
    return number


def forked(action: Callable[[], None]) -> int:
    """A process that runs ``action``; its errors are said, and it ends with 1."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(120)  # should nobody be left to kill it
    try:
        action()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def run(folder: Folder, kills: int, seed: int) -> Iterator[int]:
    """Kill and check; yields the readings beside the writers.

    Raises:
        AssertionError: a writer has failed, or what is there is no save.
        VeraFxError: it cannot be read.
    """
    random, pace = Random(seed), folder.pace()
    for _ in range(kills):
        wait = time.monotonic() + random.random() * pace * folder.writers
        with writing(folder) as pids:
            readings = 0
            if random.random() < 0.3:  # read beside them
                while time.monotonic() < wait or not readings:
                    folder.check()
                    readings += 1
            time.sleep(max(0.0, wait - time.monotonic()))
            if any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids):
                raise AssertionError("a writer has failed")
        folder.check()
        yield readings


@contextlib.contextmanager
def writing(folder: Folder) -> Iterator[list[int]]:
    """Writers, until they are killed at the end of the block."""
    pids = [forked(lambda n=n: folder.write(n)) for n in range(folder.writers)]
    try:
        yield pids
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def main() -> None:
    kills, seed, path, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for what in kinds:
        place = Path(path, what)
        place.mkdir()
        folder = KINDS[what](place)
        readings = list(run(folder, int(kills), int(seed)))
        folder.tidy()
        said = f"{len(readings)} kills, {sum(readings)} readings, {folder.last()} saves"
        sys.stdout.write(f"{what}: {said}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
