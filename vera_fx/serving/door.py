"""Connections before they are requests: how many there may be, and for how long they may say nothing."""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from vera_fx.serving.limits import Limits


class Door(H11Protocol):
    """uvicorn's protocol, which alone keeps connections open whose request never comes to an end."""

    limits: ClassVar[Limits] = Limits()

    _since: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it where there are too many."""
        super().connection_made(transport)
        host = self.client and self.client[0]
        same = sum(
            isinstance(c, Door) and (c.client and c.client[0]) == host for c in self.connections
        )
        if len(self.connections) > self.limits.connections or same > self.limits.per_client:
            transport.abort()
            return
        self._since = self.loop.time()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close the connection if it has not asked anything for too long."""
        now = self.loop.time()
        if self.cycle is not None and not self.cycle.response_complete:
            self._since = now  # a request is being answered, which has its own bounds
        elif now - self._since > self.limits.head_seconds:
            self.transport.abort()
            return
        self._timer = self.loop.call_later(self.limits.head_seconds / 4, self._look)


def server_options(limits: Limits) -> dict[str, Any]:
    """What uvicorn has to be told."""
    return {
        "http": type("Door", (Door,), {"limits": limits}),
        "ws": "none",
        "h11_max_incomplete_event_size": 16 << 10,  # of a request's head
        "server_header": False,
        "access_log": False,
        "log_level": "warning",
        "timeout_graceful_shutdown": 10,
    }
