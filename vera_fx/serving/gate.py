"""What every request passes before anything of it is read: rates, the key, the size of its body."""

import asyncio
import hashlib
import hmac
import ipaddress
import math
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vera_fx.serving.limits import Limits
from vera_fx.serving.refusals import refusal

_ADDRESSES = 10_000
_VERSION_6 = 6
_DIGITS = 15  # of a length that is worth reading


class Rate:
    """Tokens for each address: `burst` at first, then so many per second."""

    def __init__(self, per_second: float, burst: int) -> None:
        self.per_second, self.burst = per_second, burst
        self._known: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> float:
        """Take a token: 0, or the seconds until there is one."""
        if not self.per_second:
            return 0.0
        now = time.monotonic()
        tokens, before = self._known.pop(address, (float(self.burst), now))
        tokens = min(self.burst, tokens + (now - before) * self.per_second)
        wait = max(0.0, (1 - tokens) / self.per_second)
        self._known[address] = (tokens if wait else tokens - 1, now)
        if len(self._known) > _ADDRESSES:  # those who asked longest ago
            self._known.popitem(last=False)
        return wait


def address_of(scope: Scope) -> str:
    """Who asks. Whoever has an address of version 6 has the 2**64 beside it."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    if address.version == _VERSION_6:
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


@dataclass(slots=True)
class Gate:
    """Middleware that refuses what may not go on, and reads no more of a body than it may.

    Attributes:
        app: the application.
        limits: what clients may ask for.
        key: who uploads and deletes must know it; without one nobody may.
        statuses: counts of the answers by status.
        asked: the paths that are posted to and change nothing.
    """

    app: ASGIApp
    limits: Limits
    key: str | None
    statuses: Counter[int]
    asked: frozenset[str] = frozenset({"/classify"})
    _requests: Rate = field(init=False)
    _changes: Rate = field(init=False)

    def __post_init__(self) -> None:
        self._requests = Rate(self.limits.rate, self.limits.burst)
        self._changes = Rate(self.limits.changes, max(1, round(20 * self.limits.changes)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        try:
            limit = self._admit(scope)
        except HTTPException as found:
            status, words = found.status_code, found.detail
            await refusal(scope["path"], status, words, found.headers)(scope, receive, counted)
            return
        await self.app(scope, self._bounded(receive, limit), counted)

    def _admit(self, scope: Scope) -> int:
        """Most bytes of the request's body, if it may go on."""
        address, headers = address_of(scope), dict(scope["headers"])
        _refuse_often(self._requests.take(address))
        # Whatever is not known to change nothing needs the key.
        changes = scope["method"] not in {"GET", "HEAD"} and scope["path"] not in self.asked
        if changes:
            _refuse_often(self._changes.take(address))
            self._check_key(headers.get(b"authorization", b""))
        limit = self.limits.upload if changes else self.limits.body
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise HTTPException(400, "the length of the body is no number")
        if len(length) > _DIGITS or int(length) > limit:
            raise _too_large(limit)
        return limit

    def _check_key(self, given: bytes) -> None:
        if self.key is None:
            raise HTTPException(403, "this server takes no uploads and no deletes: it has no key")
        expected = f"Bearer {self.key}".encode()
        # Hashes are of one length, and tell nothing of the key by the time they take.
        digests = [hashlib.sha256(text).digest() for text in (given, expected)]
        if not hmac.compare_digest(*digests):
            raise HTTPException(
                401, "uploads and deletes need the key", {"WWW-Authenticate": "Bearer"}
            )

    def _bounded(self, receive: Receive, limit: int) -> Receive:
        """The body as it arrives, as far as it may and while there is time."""
        size, more, end = 0, True, asyncio.get_running_loop().time() + self.limits.body_seconds

        async def bounded() -> Message:
            nonlocal size, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size > limit:
                raise _too_large(limit)
            return message

        return bounded


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"a body may have at most {limit} bytes here")


def _refuse_often(wait: float) -> None:
    if wait:
        seconds = {"Retry-After": str(math.ceil(wait))}
        raise HTTPException(429, "too many requests of this address", seconds)
