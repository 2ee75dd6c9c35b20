"""Request bodies: read whole, at a pace, and within what all of them together may take.

A body is held until its engine has begun to answer, since it may have to be sent again, and not longer. What is
counted is what has arrived, so that nobody reserves room by announcing much. A client that sends slower than
GATEWAY_BODY_BYTES_PER_S, beyond a while at the beginning, is not waited for.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from common import limits
from common.errors import BodyTooLarge, GatewayFull, InvalidRequest, TimedOut, UnsupportedMediaType
from head.gateway import openai

RETRY_FULL_S = 2


class ClientGone(Exception):
    """The client left; there is nobody to answer."""


class Body:
    """One request's body while it is held."""

    __slots__ = ("_data", "_room", "size")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._data = b""
        self.size = 0

    def grow(self, size: int) -> None:
        """So many bytes more have come. Raises: BodyTooLarge, GatewayFull."""
        if self.size + size > limits.GATEWAY_BODY_BYTES:
            raise too_large()
        self._room.take(size)
        self.size += size

    def fill(self, data: bytes) -> None:
        """The body is complete."""
        self._data = data

    @property
    def data(self) -> bytes:
        """What the client sent."""
        return self._data

    def named(self, name: str, served_name: str) -> bytes:
        """What the engine gets, which knows its model as `served_name`."""
        return self._data if name == served_name else openai.with_model(self._data, served_name)

    def drop(self) -> None:
        """The body is needed no longer."""
        self._room.give(self.size)
        self.size = 0
        self._data = b""


class Room:
    """The memory of all bodies together."""

    def __init__(self, max_bytes: int) -> None:
        self.held = 0
        self._max = max_bytes

    def take(self, size: int) -> None:
        """Counts bytes in. Raises: GatewayFull when there is no room for them."""
        if self.held + size > self._max:
            raise GatewayFull(
                "the requests on their way fill the gateway's memory",
                hint="try again in a moment; gateway.bodies_bytes_max sets how much they may take",
                retry_after_s=RETRY_FULL_S,
            )
        self.held += size

    def give(self, size: int) -> None:
        """Counts bytes out."""
        self.held -= size


async def read(request: web.Request, body: Body) -> None:
    """Fills the body with what the client sends.

    Raises: BodyTooLarge, GatewayFull, UnsupportedMediaType, InvalidRequest, TimedOut; ClientGone.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("a compressed body is not accepted here", hint="send it as it is")
    length = request.content_length
    if length is not None and length > limits.GATEWAY_BODY_BYTES:
        raise too_large()
    content = request.content
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        data = content.read_nowait()
        body.grow(len(data))
        if content.at_eof():
            body.fill(data)
            return
        parts = [data]
        async with asyncio.timeout(limits.GATEWAY_BODY_GRACE_S) as patience:
            began = asyncio.get_running_loop().time()
            while not content.at_eof():
                data = await content.readany()
                body.grow(len(data))
                parts.append(data)
                earned_s = min(body.size / limits.GATEWAY_BODY_BYTES_PER_S, limits.GATEWAY_BODY_S)
                patience.reschedule(began + limits.GATEWAY_BODY_GRACE_S + earned_s)
        body.fill(b"".join(parts))
    except TimeoutError:
        raise TimedOut(
            f"the body came too slowly: {body.size} bytes",
            hint=f"at least {limits.GATEWAY_BODY_BYTES_PER_S} bytes a second, and in {limits.GATEWAY_BODY_S:g} s all",
        ) from None
    except web.RequestPayloadError:
        raise InvalidRequest("the body is broken") from None
    except ConnectionError:
        raise ClientGone from None


def too_large() -> BodyTooLarge:
    """The refusal of a body beyond the limit of one request."""
    return BodyTooLarge(f"the body is larger than {limits.GATEWAY_BODY_BYTES} bytes")
