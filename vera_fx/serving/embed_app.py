"""The HTTP side of an embedder: ``/embed``, and what clients of OpenAI's ``/v1/embeddings`` ask."""

import asyncio
import base64
import math
import struct
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field, StringConstraints

import vera_fx
from vera_fx.serving.app import Service, application, batcher
from vera_fx.serving.batcher import Answer
from vera_fx.serving.embed import Embedded
from vera_fx.serving.limits import Limits
from vera_fx.serving.refusals import FieldError

Text = Annotated[str, StringConstraints(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Asked(BaseModel):
    """One text or several, and the adapter that shall embed them."""

    inputs: Texts
    adapter: Name


class AskedAsOpenAI(BaseModel):
    """The same in OpenAI's words; ``model`` names the adapter."""

    input: Texts
    model: Name
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class Embedder(Service[Embedded]):
    """Embeds texts."""

    async def embed(self, asked: Asked) -> list[list[float]]:
        """The vectors of the texts, in their order."""
        return [found.vector for found in await self._embedded(asked.inputs, asked.adapter)]

    async def embeddings(self, asked: AskedAsOpenAI) -> dict[str, Any]:
        """The vectors of the texts, as OpenAI's clients read them."""
        found = await self._embedded(asked.input, asked.model)
        width, count = len(found[0].vector), sum(one.tokens for one in found)
        if asked.dimensions not in (None, width):
            words = f"vectors have {width} dimensions here, and are not cut"
            raise FieldError(422, words, "dimensions")
        as_text = asked.encoding_format == "base64"
        return {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _packed(one.vector) if as_text else one.vector,
                }
                for index, one in enumerate(found)
            ],
            "model": asked.model,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }

    async def models(self) -> dict[str, Any]:
        """The names of the adapters, as OpenAI lists models."""
        names = await asyncio.to_thread(self.store.names)
        return {"object": "list", "data": list(map(_entry, names))}

    async def model(self, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
            HTTPException: there is none of that name.
        """
        if name not in self.store:
            raise HTTPException(404, "there is no such adapter")
        return _entry(name)

    async def _embedded(self, texts: str | list[str], adapter: str) -> list[Embedded]:
        several = [texts] if isinstance(texts, str) else texts
        if len(several) > self.limits.inputs:
            raise HTTPException(413, f"a request may have at most {self.limits.inputs} texts")
        found = await self.answers(several, adapter)
        if not all(math.isfinite(number) for one in found for number in one.vector):
            raise HTTPException(422, "the vectors of this adapter are no finite numbers")
        return found


def _entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "vera_fx"}


def _packed(vector: list[float]) -> str:
    """Base64 of little-endian float32 numbers."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def create_embedding_app(
    embed: Answer[Embedded],
    store: vera_fx.AdapterStore,
    *,
    key: str | None = None,
    limits: Limits | None = None,
    max_batch: int = 32,
    max_wait: float = 0.005,
) -> FastAPI:
    """An application that serves the adapters of ``store`` over an embedder.

    Args:
        embed: texts and adapters' names -> vectors; called in one thread only.
        store: the adapters.
        key: what uploads and deletes must bring; without one there are none.
        limits: what clients may ask for.
        max_batch: most texts in one call of ``embed``.
        max_wait: seconds that a text waits for others to share a batch with.

    Raises:
        ConfigError: a batch may name more adapters than the store keeps.
    """
    limits = limits or Limits()
    service = Embedder(batcher(embed, store, limits, max_batch, max_wait), limits)
    asked = {"/embed": service.embed, "/v1/embeddings": service.embeddings}
    app = application(service, asked, key)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name}")(service.model)
    return app
