"""An engine that speaks OpenAI's HTTP and fails on request: real sockets, bytes under the test's control.

`fault` says what goes wrong, `gate` holds each event of a stream back until the test releases it, and `seen` and
`gone` tell what arrived and how many connections the other side ended while an answer was on its way.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

FAULTS = (
    "",
    "hang",  # never answers
    "hang_stream",  # falls silent after `fault_after` events
    "die",  # ends the connection instead of answering
    "die_after_head",  # ends it after the status line and headers
    "die_in_stream",  # ends it after `fault_after` whole events
    "die_in_event",  # ends it in the middle of the event after those
    "die_when_reused",  # ends a connection on its second request
    "garbage",  # answers something that is not HTTP
    "garbage_chunk",  # a stream whose chunks are malformed after `fault_after` events
)


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class StubEngine:
    """What the engine does; change it while it runs."""

    fault: str = ""
    fault_after: int = 1
    status: int = 200
    answer: bytes = b'{"object":"chat.completion","usage":{"prompt_tokens":7,"completion_tokens":5}}'
    answer_type: str = "application/json"
    events: Sequence[bytes] = (b'data: {"n":1}\n\n', b'data: {"n":2}\n\n', b"data: [DONE]\n\n")
    extra_headers: str = ""
    is_chunked: bool = True  # streams; else until the connection ends
    is_healthy: bool = True
    gate: asyncio.Semaphore | None = None
    seen: list[Seen] = field(default_factory=list)
    gone: int = 0
    connections: int = 0
    sent_bytes: int = 0
    port: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)  # of its connections

    def stop_all(self) -> None:
        """Ends every connection, as a process that ends does."""
        for task in tuple(self.tasks):
            task.cancel()

    @property
    def requests(self) -> list[Seen]:
        """What arrived, health checks left out."""
        return [seen for seen in self.seen if seen.path != "/health"]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        served = 0
        try:
            while (request := await self._read(reader)) is not None:
                served += 1
                if self.fault == "die_when_reused" and served > 1:
                    return
                self.seen.append(request)
                watch = asyncio.ensure_future(reader.read(1))
                work = asyncio.ensure_future(self._answer(request, writer))
                try:
                    await asyncio.wait((watch, work), return_when=asyncio.FIRST_COMPLETED)
                    if work.done() and work.exception() is not None:
                        await asyncio.wait((watch,))  # writing failed because the other side ended the connection
                    if watch.done() and (not work.done() or work.exception() is not None):
                        self.gone += 1
                        return
                    if not work.result():
                        return
                finally:
                    for task in (watch, work):
                        task.cancel()
                    await asyncio.gather(watch, work, return_exceptions=True)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side ended it
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> Seen | None:
        head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
        if not head:
            return None
        first, *lines = head[:-4].decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            assert name.lower() not in headers, f"{name} was sent twice"
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Seen(method, path, headers, body)

    async def _answer(self, request: Seen, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        if request.path == "/health":
            status = b"200 OK" if self.is_healthy else b"503 Not Well"
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\nok" % status)
            await writer.drain()
            return True
        match self.fault:
            case "hang":
                await asyncio.Event().wait()
            case "die":
                return False
            case "garbage":
                writer.write(b"220 mail.example ESMTP\r\n")
                await asyncio.Event().wait()
        if self.status == 200 and json.loads(request.body).get("stream"):
            return await self._stream(writer)
        head = f"HTTP/1.1 {self.status} X\r\nContent-Type: {self.answer_type}\r\n{self.extra_headers}"
        writer.write(f"{head}Content-Length: {len(self.answer)}\r\n\r\n".encode())
        if self.fault == "die_after_head":
            await writer.drain()
            return False
        writer.write(self.answer)
        await writer.drain()
        return True

    async def _stream(self, writer: asyncio.StreamWriter) -> bool:
        coding = "Transfer-Encoding: chunked\r\n" if self.is_chunked else ""
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{self.extra_headers}{coding}\r\n".encode())
        await writer.drain()
        if self.fault == "die_after_head":
            return False
        for number, event in enumerate(self.events):
            if self.gate is not None:
                await self.gate.acquire()
            if number == self.fault_after and not await self._fail(event, writer):
                return False
            self._piece(event, writer)
            await writer.drain()
        if self.is_chunked:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        return self.is_chunked

    async def _fail(self, event: bytes, writer: asyncio.StreamWriter) -> bool:
        match self.fault:
            case "die_in_stream":
                return False
            case "die_in_event":
                self._piece(event[: len(event) // 2], writer)
                await writer.drain()
                return False
            case "garbage_chunk":
                writer.write(b"zz\r\nnonsense")
                await asyncio.Event().wait()
            case "hang_stream":
                await asyncio.Event().wait()
        return True

    def _piece(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data)
        self.sent_bytes += len(data)


@asynccontextmanager
async def running(engine: StubEngine | None = None, *, port: int = 0) -> AsyncIterator[StubEngine]:
    """The engine on a port of its own until the block ends."""
    engine = engine or StubEngine()
    tasks = engine.tasks

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await engine.serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the block has ended
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    engine.port = server.sockets[0].getsockname()[1]
    try:
        yield engine
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
