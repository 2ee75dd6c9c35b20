"""Length-prefixed msgpack frames over an asyncio stream, as mover and holder speak them."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec

from agent.mover.protocol import FRAME_BYTES, LENGTH
from herder.decoding import UNREADABLE

T = TypeVar("T")


class BrokenFrame(Exception):
    """The other side sent what is not a frame of its protocol."""


async def read_frame(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The next message, None at the end of the stream. Raises: BrokenFrame."""
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if length > FRAME_BYTES:
            raise BrokenFrame(f"a frame of {length} bytes")
        return decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except UNREADABLE as error:
        raise BrokenFrame(str(error)) from None
