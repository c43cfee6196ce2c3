"""Gathers requests that wait into batches, whichever adapters they ask for."""

import asyncio
import concurrent.futures
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import vera_fx

R = TypeVar("R")

Answer = Callable[[Sequence[str], Sequence[str]], list[R]]
"""Texts and adapters' names to what the model says to each."""

Classify = Answer[list[float]]


class OverloadedError(Exception):
    """Too many requests wait, or the server is stopping."""


@dataclass(slots=True)
class Waiting(Generic[R]):
    """One text: its adapter, and where its answer will appear."""

    text: str
    adapter: str
    result: asyncio.Future[R]


@dataclass(slots=True)
class Batcher(Generic[R]):
    """Runs ``answer`` in one thread, for at most ``max_batch`` texts at a time.

    Attributes:
        answer: texts and adapters' names -> an answer for each.
        store: the adapters; each is loaded before a batch, so that a bad one fails alone.
        max_batch: most texts in a batch.
        max_wait: seconds that the first text of a batch waits for others.
        max_queue: most texts that may wait.
        counts: batches and rows so far.
    """

    answer: Answer[R]
    store: vera_fx.AdapterStore
    max_batch: int = 32
    max_wait: float = 0.005
    max_queue: int = 1024
    counts: Counter[str] = field(default_factory=Counter)
    _queue: asyncio.Queue[Waiting[R] | None] = field(default_factory=asyncio.Queue)
    _task: asyncio.Task[None] | None = None
    _thread: concurrent.futures.ThreadPoolExecutor = field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(1, "model")
    )

    def start(self) -> None:
        """Begin to serve; inside a running event loop."""
        self._task = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """Answer everything that waits, then end."""
        task, self._task = self._task, None
        await self._queue.put(None)
        if task is not None:
            await task
        self._thread.shutdown()

    @property
    def waiting(self) -> int:
        """Texts that wait for a batch."""
        return self._queue.qsize()

    async def submit(self, text: str, adapter: str) -> R:
        """The answer to a text by an adapter.

        Raises:
            OverloadedError: the queue is full, or the server is stopping.
            VeraFxError: the adapter is unknown, was deleted meanwhile, or cannot be loaded.
        """
        if self._task is None or self._queue.qsize() >= self.max_queue:
            raise OverloadedError
        result: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        await self._queue.put(Waiting(text, adapter, result))
        return await result

    async def _serve(self) -> None:
        loop, last = asyncio.get_running_loop(), False
        while not last:
            batch, last = await self._gather()
            if batch:
                try:
                    answers = await loop.run_in_executor(self._thread, self._answers, batch)
                except Exception as error:  # the next batch is to be served whatever this one met
                    answers = [error] * len(batch)
                for item, answer in zip(batch, answers, strict=True):
                    _settle(item.result, answer)

    async def _gather(self) -> tuple[list[Waiting[R]], bool]:
        """The next batch, and whether it is the last."""
        first = await self._queue.get()
        if first is None:
            return [], True
        batch, end = [first], asyncio.get_running_loop().time() + self.max_wait
        while len(batch) < self.max_batch:
            left = end - asyncio.get_running_loop().time()
            try:
                item = (
                    await asyncio.wait_for(self._queue.get(), left)
                    if left > 0
                    else self._queue.get_nowait()
                )
            except (TimeoutError, asyncio.QueueEmpty):
                break
            if item is None:
                return batch, True
            batch.append(item)
        return [item for item in batch if not item.result.cancelled()], False

    def _answers(self, batch: list[Waiting[R]]) -> list[R | Exception]:
        bad: dict[str, Exception] = {}
        for name in {item.adapter for item in batch}:
            try:
                self.store.load(name)
            except vera_fx.VeraFxError as error:
                bad[name] = error
        good = [item for item in batch if item.adapter not in bad]
        answers = iter(self._all(good))
        return [bad.get(item.adapter) or next(answers) for item in batch]

    def _all(self, batch: list[Waiting[R]]) -> list[R | Exception]:
        """All at once; if that fails, one by one, so that a failure stays with its request."""
        if not batch:
            return []
        self.counts.update(batches=1, rows=len(batch))
        try:
            answers = self.answer([i.text for i in batch], [i.adapter for i in batch])
            return [row for _, row in zip(batch, answers, strict=True)]
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [answer for item in batch for answer in self._all([item])]


def _settle(result: asyncio.Future[R], answer: R | Exception) -> None:
    if result.done():  # the client has gone
        return
    if isinstance(answer, Exception):
        result.set_exception(answer)
    else:
        result.set_result(answer)
