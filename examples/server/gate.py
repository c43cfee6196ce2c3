"""What every request passes: a bound on its body, and the count of what was answered."""

from collections import Counter
from dataclasses import dataclass

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class Gate:
    """Middleware that reads no more of a body than it may, whoever asks for it.

    Attributes:
        app: the application.
        limit: most bytes of a body.
        statuses: counts of the answers by status.
    """

    app: ASGIApp
    limit: int
    statuses: Counter[int]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit:
                raise HTTPException(413, f"a request may have at most {self.limit} bytes")
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        is_http = scope["type"] == "http"
        await self.app(scope, bounded if is_http else receive, counted if is_http else send)
