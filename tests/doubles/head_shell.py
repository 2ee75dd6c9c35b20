"""What tests of the head's shell share: a small core, records to write, a journal that can refuse, an agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import aiohttp
import msgspec
from aiohttp import web

from common import wire
from common.errors import AlreadyExists, HerderError, StateReadOnly
from head.core import events as ev
from head.core.effects import CloseSession, Send
from head.core.objects import ApiKey, Meta, Model, Node
from head.core.records import Record
from head.core.state import Live, State
from head.core.turn import Turn
from head.journal import Row
from herder import types as api
from herder.types import StoryLine

NOW_MS = 1_700_000_000_000


def model(name: str, *, note: str = "") -> Model:
    """A model with nothing special."""
    return Model(name, "llm", "main", NOW_MS, NOW_MS, metadata={"note": note} if note else {})


def record(revision: int, name: str, *, what: str = "model_registered", cause: str = "req-1", note: str = "") -> Record:
    """A record that puts a model."""
    return Record(revision, NOW_MS + revision, what, cause, "model", name, model(name, note=note), {"note": note})


def removal(revision: int, name: str) -> Record:
    """A record that deletes a model."""
    return Record(revision, NOW_MS + revision, "model_deleted", "req-2", "model", name, None)


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits for a condition; TimeoutError when it does not come."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - tests look at things that announce nothing
            await asyncio.sleep(0.002)


class FakeIds:
    """Counts instead of drawing."""

    def __init__(self) -> None:
        self.count = 0

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}-{self.count}"

    def secret(self) -> str:
        self.count += 1
        return f"{self.count:064x}"

    def uniform(self, low: int, high: int) -> int:
        return low


class SwitchJournal:
    """A journal in memory: `problem` set, it refuses; `gate` cleared, commits wait."""

    def __init__(self) -> None:
        self.problem: HerderError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.batches: list[list[Row]] = []
        self.waiting = 0

    @property
    def rows(self) -> list[Row]:
        """Everything that was made durable."""
        return [row for batch in self.batches for row in batch]

    def fill_disk(self) -> None:
        """From now on every commit is refused."""
        self.problem = StateReadOnly("the journal cannot be written: disk full")

    async def commit(self, rows: Sequence[Row]) -> None:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        if self.problem is not None:
            raise self.problem
        self.batches.append(list(rows))

    async def story(self, id: str, *, kind: str = "", before: int = 0, limit: int = 500) -> list[StoryLine]:
        return [StoryLine(row.at_ms, row.revision, row.what, row.kind, row.key, row.cause) for row in self.rows]


def register(name: str, request_id: str = "req-1") -> ev.RegisterModelRequested:
    """A request that makes a model."""
    return ev.RegisterModelRequested(request_id=request_id, actor="test", body=api.RegisterModel(name=name))


def small_step(state: State, event: ev.Event, now_ms: int) -> Turn:
    """A core of a few rules, with the manners of the real one."""
    turn = Turn(state, now_ms, cause=getattr(event, "request_id", "") or type(event).__name__)
    match event:
        case ev.HeadStarted():
            meta = state.meta.get("cluster") or Meta(event.cluster_id, 0, now_ms)
            turn.put(msgspec.structs.replace(meta, head_epoch=meta.head_epoch + 1), "head_started")
            state.ticket_secret = event.ticket_secret
        case ev.RegisterModelRequested() if event.body.name == "bug":
            turn.put(model("half-done"), "model_registered")
            turn.rollback()
            raise ZeroDivisionError("a bug in the step")
        case ev.RegisterModelRequested() if event.body.name == "unstorable":
            turn.put(model("unstorable").__class__("unstorable", "llm", "main", 0, 0, metadata={"x": object()}), "made")
        case ev.RegisterModelRequested() if event.body.name in state.models:
            turn.refuse(event, AlreadyExists(f"{event.body.name} exists"))
        case ev.RegisterModelRequested():
            turn.put(model(event.body.name), "model_registered")
            turn.reply(event, reference=f"model:{event.body.name}")
        case ev.WhyRequested():
            turn.reply(event, value=sorted(state.models))
        case ev.CreateKeyRequested():
            body = event.body
            turn.put(ApiKey(event.fresh_id, body.name, body.role, event.secret_sha256, now_ms), "key_created")
            turn.reply(event, reference=f"key:{event.fresh_id}")
        case ev.AgentSaidHello():
            _hello(turn, event, now_ms)
        case ev.LeaseRenewed():
            turn.emit(Send(event.node, event.session_id, wire.Ack(event.lease.seq, 15_000, 5_000)))
        case ev.ResultReceived():
            turn.put(model(f"done-{event.result.op_id}"), "result_kept")
            ack = wire.ResultAck(event.result.op_id, event.result.generation)
            turn.emit(Send(event.node, event.session_id, ack))
        case ev.SessionClosed():
            live = state.live.get(event.node)
            if live is not None and live.session_id == event.session_id:
                live.session_id = ""
        case _:
            pass
    return turn


def _hello(turn: Turn, event: ev.AgentSaidHello, now_ms: int) -> None:
    hello, state = event.hello, turn.state
    if hello.cluster_id not in ("", state.cluster_id):
        from common.errors import WrongCluster

        turn.emit(CloseSession(event.session_id, WrongCluster("another cluster").info()))
        return
    node = Node(hello.node_id, hello.boot_id, hello.agent_id, "1", hello.inventory, now_ms, "online", now_ms, 1)
    if state.nodes.get(node.id) != node:
        turn.put(node, "node_joined")
    state.live[node.id] = Live(session_id=event.session_id)
    welcome = wire.Welcome(1, state.cluster_id, state.head_epoch, event.session_id, 15_000, 5_000, 0, "")
    turn.emit(Send(node.id, event.session_id, welcome))


def hello(node: str = "n1", *, cluster_id: str = "") -> wire.Hello:
    """A hello with little in it."""
    return wire.Hello(1, 1, node, "boot-1", "agent-1", "1", wire.Inventory(hostname=node), cluster_id=cluster_id)


class FakeAgent:
    """The agent's end of a session."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def say(self, message: wire.Message) -> None:
        """Sends one frame."""
        await self.ws.send_str(wire.encode(message).decode())

    async def hear(self) -> wire.Message:
        """The next frame; an assertion fails when the session ends instead."""
        frame = await self.ws.receive(timeout=10)
        assert frame.type is aiohttp.WSMsgType.TEXT, (frame.type, frame.data, frame.extra)
        message = wire.decode(frame.data)
        assert message is not None
        return message

    async def hear_end(self) -> int | None:
        """Reads to the end of the session and returns its close code."""
        while True:
            frame = await self.ws.receive(timeout=10)
            if frame.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                return self.ws.close_code


@web.middleware
async def answer_errors(request: web.Request, handler: object) -> web.StreamResponse:
    """The least of an API: errors as JSON with their status."""
    try:
        return await handler(request)  # type: ignore[operator,no-any-return]
    except HerderError as error:
        return web.json_response({"error": {"code": error.code, "message": error.message}}, status=error.status)
