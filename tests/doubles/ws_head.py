"""A head's websocket for agents under test: welcomes, acknowledges, remembers what agents say, misbehaves when told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from aiohttp import WSMsgType, web

from common import wire

M = TypeVar("M", bound=wire.Message)
TOKEN = "hdr_agent_1_secret"
WAIT_S = 20.0


async def until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Waits for a condition."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - any condition, not one event
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


class WsHead:
    """See the module's first lines. Change the fields to change its manners."""

    def __init__(self) -> None:
        self.port = 0
        self.epoch = 1
        self.cluster_id = "cluster-1"
        self.interval_ms = 200
        self.lease_ms = 600
        self.respread_ms = 0
        self.refusal: wire.Refused | None = None
        self.is_acking = True
        self.is_silent = False  # never says welcome
        self.first_frame: bytes | None = None  # instead of a welcome
        self.hellos: list[wire.Hello] = []
        self.received: list[wire.Message] = []
        self.tokens: list[str] = []
        self.sessions = 0
        self.files: dict[str, bytes] = {}  # "run/name" -> what a run sent
        self._socket: web.WebSocketResponse | None = None
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> WsHead:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_put("/api/v1/agent/runs/{run}/artifacts/{name}", self._put)
        app.router.add_get("/api/v1/agent", self._agent)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.cut()
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """What an agent dials."""
        return f"http://127.0.0.1:{self.port}"

    async def cut(self) -> None:
        """Closes the session."""
        if self._socket is not None:
            await self._socket.close()

    async def send(self, message: wire.Message) -> None:
        """A message to the agent."""
        assert self._socket is not None
        await self._socket.send_str(wire.encode(message).decode())

    async def command(self, body: wire.AnyCommand, generation: int, op_id: str) -> None:
        """A command."""
        await self.send(wire.Command(op_id, generation, self.epoch, "job-1", body))

    def of(self, kind: type[M]) -> list[M]:
        """Messages of a kind that came so far."""
        return [message for message in self.received if isinstance(message, kind)]

    def result(self, op_id: str, generation: int) -> wire.Result | None:
        """The result of a command, once it came."""
        for result in self.of(wire.Result):
            if (result.op_id, result.generation) == (op_id, generation):
                return result
        return None

    def replica(self, replica: str) -> wire.ReplicaStatus | None:
        """A replica as last reported."""
        reports = self.of(wire.Report)
        found = [status for status in reports[-1].replicas if status.replica == replica] if reports else []
        return found[0] if found else None

    async def _put(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.Response(status=401)
        self.files[f"{request.match_info['run']}/{request.match_info['name']}"] = await request.read()
        return web.json_response({})

    async def _agent(self, request: web.Request) -> web.StreamResponse:
        self.tokens.append(request.headers.get("Authorization", ""))
        if self.tokens[-1] != f"Bearer {TOKEN}":
            return web.Response(status=401)
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        self._socket = socket
        async for frame in socket:
            if frame.type is WSMsgType.TEXT:
                message = wire.decode(frame.data)
                assert message is not None
                await self._received(socket, message)
        return socket

    async def _received(self, socket: web.WebSocketResponse, message: wire.Message) -> None:
        self.received.append(message)
        match message:
            case wire.Hello():
                self.hellos.append(message)
                if self.first_frame is not None:
                    await socket.send_bytes(self.first_frame)
                elif self.refusal is not None:
                    await self.send(self.refusal)
                    await socket.close()
                elif not self.is_silent:
                    self.sessions += 1
                    session = f"session-{self.sessions}"
                    await self.send(
                        wire.Welcome(
                            1, self.cluster_id, self.epoch, session, self.lease_ms, self.interval_ms,
                            self.respread_ms, "a2V5",
                        )
                    )  # fmt: skip
            case wire.Lease() if self.is_acking:
                await self.send(wire.Ack(message.seq, self.lease_ms, self.interval_ms))
            case _:
                pass
