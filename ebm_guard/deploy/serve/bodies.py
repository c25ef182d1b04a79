"""The body of one request: read within limits, or let go without losing the answer."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from ebm_guard.deploy.serve.refusal import RefusedError

if TYPE_CHECKING:
    from fastapi import Request

# Bytes that a client has sent already, as a rule, when its request is looked at.
_SMALL = 64 * 1024
_SOON = 0.5
# Times max_bytes that are read, at most, of a body that is refused.
_DRAINED = 2


class Body:
    """Read a body once.

    Args:
        request: whose body it is.
        max_bytes: the longest that is taken.
        seconds: for all of it.
    """

    def __init__(self, request: Request, max_bytes: int, seconds: float) -> None:
        self.max_bytes, self.seconds = max_bytes, seconds
        self._receive = request.receive
        length = request.headers.get("content-length", "")
        # Longer numbers are no lengths, and int() refuses some of them.
        self._declared = int(length) if length.isdecimal() and len(length) < 20 else None
        self._waits = "expect" in request.headers
        self._count = 0
        self._late = False
        self.ended = False

    async def read(self) -> bytes:
        """Return all of it.

        Raises:
            RefusedError: too long, too slow, or the client went away.
        """
        if self._declared is not None and self._declared > self.max_bytes:
            raise self._too_long()
        parts = []
        try:
            async with asyncio.timeout(self.seconds):
                while not self.ended:
                    parts.append(await self._part())
                    if self._count > self.max_bytes:
                        raise self._too_long()
        except TimeoutError:
            self._late = True
            raise RefusedError(
                "timeout", f"the body did not come within {self.seconds:g} seconds"
            ) from None
        return b"".join(parts)

    async def skip_small(self) -> None:
        """Take a small body that is here already, so that its connection can be kept."""
        small = self._declared is not None and self._declared <= _SMALL
        if small and not (self._late or self._waits):
            await self._skip(min(_SOON, self.seconds))

    async def drain(self) -> None:
        """Read on after the answer, and keep nothing, within the limits.

        Many clients send all before they read. If the connection is closed on them, the answer is
        lost with it, because the kernel then resets the connection.
        """
        hopeless = self._declared is not None and self._declared > _DRAINED * self.max_bytes
        # A client that waits to be asked for its body has sent none of it.
        if not (self._late or self._waits or hopeless):
            await self._skip(self.seconds)

    async def _skip(self, seconds: float) -> None:
        with suppress(TimeoutError, RefusedError):
            async with asyncio.timeout(seconds):
                while not self.ended and self._count <= _DRAINED * self.max_bytes:
                    await self._part()

    async def _part(self) -> bytes:
        # Reading asks for it.
        self._waits = False
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.ended = True
            raise RefusedError("unreadable", "the client went away before the body came")
        part: bytes = message.get("body", b"")
        self._count += len(part)
        self.ended = not message.get("more_body", False)
        return part

    def _too_long(self) -> RefusedError:
        return RefusedError(
            "too_large", f"the body is longer than {self.max_bytes:,} bytes; send a smaller one"
        )
