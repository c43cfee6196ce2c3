"""Two processes with a gloo group between them, started once and used by one case after the other.

A case is a module-level function: ``@two_processes`` makes a test of it that runs it in both processes.
Whatever goes wrong in either, or takes too long, is one failure with the traceback; the pair is then
stopped, and the next case starts another one.
"""

import functools
import importlib
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist

WORLD = 2
SECONDS = 120.0
"""How long a case may take, with the start of the processes."""


def two_processes(case: Callable[..., None]) -> Callable[..., None]:
    """Run a test in both processes, each of which has an own rank in the default group."""

    @functools.wraps(case)
    def test(**parameters: Any) -> None:
        pair().run(case, parameters)

    return test


def four_processes(case: Callable[..., None]) -> Callable[..., None]:
    """Run a test in four processes of its own: for meshes of two dimensions."""

    @functools.wraps(case)
    def test(**parameters: Any) -> None:
        four = Pair(2 * WORLD)
        try:
            four.run(case, parameters)
        finally:
            four.stop()

    return test


class Pair:
    """Two processes that wait for cases, or as many as are asked for."""

    def __init__(self, world: int = WORLD) -> None:
        context, port = multiprocessing.get_context("spawn"), _free_port()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, case: Callable[..., None], parameters: dict[str, Any]) -> None:
        """Run one case in both processes.

        Raises:
            AssertionError: with what went wrong in one of them.
        """
        for pipe in self._pipes:
            pipe.send((case.__module__, case.__qualname__, parameters))
        try:
            problem = self._problem(time.monotonic() + SECONDS)
        except BaseException:
            self.stop()
            raise
        if problem is not None:
            self.stop()
            raise AssertionError(problem)

    def _problem(self, end: float) -> str | None:
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = wait(list(waiting.values()), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                return f"rank {sorted(waiting)} did not end within {SECONDS:.0f} seconds"
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                problem = self._answer(rank)
                del waiting[rank]
                if problem is not None:
                    return "\n".join([f"in rank {rank}: {problem}", *self._others(waiting)])
        return None

    def _others(self, waiting: dict[int, Connection]) -> Iterator[str]:
        """What is wrong with the other ranks, which may be the cause of it, if that shows soon."""
        for rank, pipe in waiting.items():
            problem = self._answer(rank) if pipe.poll(2.0) else None
            if problem is not None:
                yield f"in rank {rank}: {problem}"

    def _answer(self, rank: int) -> str | None:
        try:
            return self._pipes[rank].recv()
        except (EOFError, ConnectionError):
            self._processes[rank].join(timeout=10)
            return f"the process died with exit code {self._processes[rank].exitcode}"

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        _pairs[:] = [known for known in _pairs if known is not self]


_pairs: list[Pair] = []


def pair() -> Pair:
    """The pair of this process, started when it is first needed."""
    if not _pairs:
        _pairs.append(Pair())
    return _pairs[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    """Run cases until the pipe is closed."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    # As in the suite: warnings of ours are errors unless a case expects them.
    warnings.filterwarnings("error", module=r"vera_fx(\..*)?")
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    while True:
        try:
            module, name, parameters = pipe.recv()
        except EOFError:
            return
        pipe.send(_result(module, name, parameters))


def _result(module: str, name: str, parameters: dict[str, Any]) -> str | None:
    """None if the case went well in this process, else what happened."""
    try:
        torch.manual_seed(0)
        case = getattr(importlib.import_module(module), name)
        with mock.patch.dict(os.environ):  # accelerate leaves its choice of FSDP there for ever
            case.__wrapped__(**parameters)
    except BaseException:
        return traceback.format_exc()
    return None
