"""The HTTP side of a classifier, and what all services have: upload, delete, health and metrics."""

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Generic

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

import vera_fx
from vera_fx.serving.batcher import Batcher, Classify, OverloadedError, R
from vera_fx.serving.gate import Gate
from vera_fx.serving.limits import Limits
from vera_fx.serving.refusals import malformed, refused
from vera_fx.serving.uploads import add, parts


class Question(BaseModel):
    """A text, and the adapter that shall judge it."""

    text: str = Field(min_length=1)
    adapter: str = Field(min_length=1, max_length=128)


class Answer(BaseModel):
    """The label with the highest score, and all scores."""

    label: str
    scores: dict[str, float]


class Service(Generic[R]):
    """The handlers that every service has, over one store and one batcher."""

    def __init__(self, batcher: Batcher[R], limits: Limits) -> None:
        self.batcher, self.store = batcher, batcher.store
        self.limits = limits
        self.statuses: Counter[int] = Counter()
        self.uploading = 0
        self.adding = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Serve between start and stop; what waits at the stop is answered."""
        self.batcher.start()
        yield
        await self.batcher.stop()

    async def answers(self, texts: Sequence[str], adapter: str) -> list[R]:
        """What the model says to some texts by an adapter, in their order.

        Raises:
            HTTPException: the texts are too long, the adapter is unknown, or no answer came.
        """
        if any(len(text) > self.limits.text for text in texts):
            raise HTTPException(413, f"the text has more than {self.limits.text} characters")
        if adapter not in self.store:
            raise HTTPException(404, "there is no such adapter")
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                return await self._submitted(texts, adapter)
        except OverloadedError:
            raise HTTPException(503, "too many requests wait", {"Retry-After": "1"}) from None
        except TimeoutError:
            raise HTTPException(504, "the answer took too long") from None
        except vera_fx.AdapterError:
            raise HTTPException(404, "there is no such adapter any more") from None
        except vera_fx.VeraFxError:
            raise HTTPException(422, "this adapter cannot be used") from None
        except Exception as error:
            raise HTTPException(500, "the model failed on this text") from error

    async def _submitted(self, texts: Sequence[str], adapter: str) -> list[R]:
        """All or none: once one fails, the others that still wait are taken out of the queue."""
        tasks = [asyncio.ensure_future(self.batcher.submit(text, adapter)) for text in texts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def upload(self, name: str, request: Request) -> dict[str, str]:
        """Take a new adapter; it serves at once."""
        if self.uploading >= self.limits.uploads:
            raise HTTPException(503, "too many uploads at a time", {"Retry-After": "1"})
        self.uploading += 1
        try:
            config, weights = parts(await request.body(), self.limits.names)
            async with self.adding:
                await self._add(name, config, weights)
        finally:
            self.uploading -= 1
        return {"adapter": name}

    async def _add(self, name: str, config: dict[str, Any], weights: bytes) -> None:
        if name in self.store:
            raise HTTPException(409, "there is an adapter of that name; delete it first")
        if len(await asyncio.to_thread(self.store.names)) >= self.limits.adapters:
            raise HTTPException(409, "there is no room for more adapters; delete one first")
        try:
            await asyncio.to_thread(add, self.store, name, config, weights)
        except vera_fx.AdapterError as error:
            raise HTTPException(400, str(error)[:500]) from None
        except vera_fx.VeraFxError:
            raise HTTPException(422, "these files are no adapter for this model") from None
        except OSError:
            raise HTTPException(507, "the adapter could not be written") from None

    async def delete(self, name: str) -> None:
        """Delete an adapter."""
        try:
            await asyncio.to_thread(self.store.delete, name)
        except vera_fx.AdapterError:
            raise HTTPException(404, "there is no such adapter") from None

    async def health(self) -> dict[str, Any]:
        """Answer as long as the event loop turns."""
        names = await asyncio.to_thread(self.store.names)
        return {"status": "ok", "adapters": len(names)}

    async def metrics(self) -> Response:
        """Counters in Prometheus' text form."""
        found = sorted(self.statuses.items())
        lines = [f'http_responses_total{{status="{status}"}} {n}' for status, n in found]
        lines += [f"{name}_total {self.batcher.counts[name]}" for name in ("batches", "rows")]
        lines.append(f"requests_waiting {self.batcher.waiting}")
        lines.append(f"adapters_in_memory {len(self.store.loaded())}")
        for name in ("loads", "hits", "evictions", "failures"):
            lines.append(f"adapter_{name}_total {getattr(self.store.counts, name)}")
        return Response("\n".join(lines) + "\n", media_type="text/plain")


class Classifier(Service[list[float]]):
    """Judges texts."""

    def __init__(
        self, batcher: Batcher[list[float]], limits: Limits, labels: Sequence[str]
    ) -> None:
        super().__init__(batcher, limits)
        self.labels = labels

    async def classify(self, question: Question) -> Answer:
        """Judge a text."""
        [scores] = await self.answers([question.text], question.adapter)
        if not all(map(math.isfinite, scores)):
            raise HTTPException(422, "the scores of this adapter are no finite numbers")
        named = dict(zip(self.labels, scores, strict=True))
        return Answer(label=max(named, key=lambda label: named[label]), scores=named)


def create_app(
    classify: Classify,
    store: vera_fx.AdapterStore,
    labels: Sequence[str],
    *,
    key: str | None = None,
    limits: Limits | None = None,
    max_batch: int = 32,
    max_wait: float = 0.005,
) -> FastAPI:
    """An application that serves the adapters of ``store`` over a classifier.

    Args:
        classify: texts and adapters' names -> scores; called in one thread only.
        store: the adapters.
        labels: names of the scores.
        key: what uploads and deletes must bring; without one there are none.
        limits: what clients may ask for.
        max_batch: most texts in one call of ``classify``.
        max_wait: seconds that a text waits for others to share a batch with.

    Raises:
        ConfigError: a batch may name more adapters than the store keeps.
    """
    limits = limits or Limits()
    service = Classifier(batcher(classify, store, limits, max_batch, max_wait), limits, labels)
    return application(service, {"/classify": service.classify}, key)


def batcher(
    answer: Callable[[Sequence[str], Sequence[str]], list[R]],
    store: vera_fx.AdapterStore,
    limits: Limits,
    max_batch: int,
    max_wait: float,
) -> Batcher[R]:
    """A batcher that a store can serve.

    Raises:
        ConfigError: a batch may name more adapters than the store keeps.
    """
    if max_batch > store.capacity:
        raise vera_fx.ConfigError(
            f"max_batch is {max_batch}, but the store keeps only {store.capacity} adapters; raise its capacity"
        )
    return Batcher(answer, store, max_batch, max_wait, limits.waiting)


_NO_PAGES: Any = {"docs_url": None, "redoc_url": None, "openapi_url": None}


def application(
    service: Service[Any], asked: Mapping[str, Callable[..., Any]], key: str | None
) -> FastAPI:
    """The application of a service.

    Args:
        service: the service.
        asked: paths that are posted to, and what answers them.
        key: what uploads and deletes must bring; without one there are none.
    """
    app = FastAPI(title="vera_fx", lifespan=service.lifespan, **_NO_PAGES)
    bounds = {"limits": service.limits, "key": key, "statuses": service.statuses}
    app.add_middleware(Gate, asked=frozenset(asked), **bounds)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(StarletteHTTPException, refused)
    for path, handler in asked.items():
        app.post(path)(handler)
    app.put("/adapters/{name}", status_code=201)(service.upload)
    app.delete("/adapters/{name}", status_code=204)(service.delete)
    app.get("/health")(service.health)
    app.get("/metrics")(service.metrics)
    return app
