"""Reading logs as entries: JSON lines of the head, taken up again where a connection broke.

The latest cursor of each source is kept here. After a break they are sent along, and the head goes on after them, so
no line is lost and none comes twice. A stream that ends without saying that it has ended was broken.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import msgspec

from herder.decoding import UNREADABLE
from herder.errors import HerderApiError, HerderConnectionError, HerderError
from herder.following import LINE_BYTES, RECONNECT_BASE_S, RECONNECT_CAP_S, UNREACHABLE_S, is_passing
from herder.transport import PREFIX, Transport
from herder.types import LogEntry

IDLE_S = 60.0  # the head sends a sign of life every 15 s to followers, and every 3 s while a node searches
QUERY_CHARS = 4_000  # more cursors than that go in a body
BATCH_ENTRIES = 500
Wanted = Mapping[str, str | int | bool | None]


async def log_batches(
    transport: Transport, wanted: Wanted, *, is_resuming: bool = True
) -> AsyncGenerator[list[LogEntry], None]:
    """Entries as they come, in batches; also those that only say which logs there are, and how far they have come.

    wanted: the parameters of GET /api/v1/logs. Raises: HerderApiError when refused; HerderConnectionError when the head
    stays away for UNREACHABLE_S.
    """
    rng, failures, since = random.Random(), 0, 0.0
    loop = asyncio.get_running_loop()
    cursors: dict[str, str] = {}
    while True:
        try:
            async with aclosing(_once(transport, wanted, cursors)) as batches:
                async for batch in batches:
                    failures = 0
                    for entry in batch:
                        _note(cursors, entry)
                    yield batch
                    if batch[-1].is_end:
                        return
            raise HerderConnectionError("cut_off", "the log broke off before its end")
        except HerderError as error:
            since = since if failures else loop.time()
            has_begun = bool(cursors)
            if not is_resuming or not has_begun or not is_passing(error) or loop.time() - since > UNREACHABLE_S:
                raise
        failures += 1
        await asyncio.sleep(rng.uniform(0.05, min(RECONNECT_CAP_S, RECONNECT_BASE_S * 2 ** min(failures, 8))))


def _note(cursors: dict[str, str], entry: LogEntry) -> None:
    if entry.cursor:
        cursors[entry.cursor.rsplit("/", 2)[0]] = entry.cursor


async def _once(
    transport: Transport, wanted: Wanted, cursors: Mapping[str, str]
) -> AsyncGenerator[list[LogEntry], None]:
    """One request's entries, in the batches in which they come."""
    query = {**wanted, "format": "jsonl"}
    if cursors:
        query["cursor"] = ",".join(cursors.values())
    is_long = len(str(query.get("cursor", ""))) > QUERY_CHARS
    body = {name: value for name, value in query.items() if value not in (None, "")} if is_long else None
    method = "POST" if is_long else "GET"
    path = f"{PREFIX}/logs"
    async with transport.stream(
        method, path, query=None if is_long else query, body=body, idle_timeout_s=IDLE_S
    ) as pieces:
        rest = b""
        async for piece in pieces:
            *whole, rest = (rest + piece).split(b"\n")
            if len(rest) > LINE_BYTES:
                raise HerderConnectionError("cut_off", f"a line of the stream is longer than {LINE_BYTES} bytes")
            for start in range(0, len(whole), BATCH_ENTRIES):
                yield [_entry(line) for line in whole[start : start + BATCH_ENTRIES]]


def _entry(line: bytes) -> LogEntry:
    try:
        return msgspec.json.decode(line, type=LogEntry)
    except UNREADABLE as error:
        raise HerderApiError("unexpected_answer", f"an entry of the log cannot be read: {error}") from None
