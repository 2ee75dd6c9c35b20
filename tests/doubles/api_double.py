"""A head's API in small, for tests of the client and the command line: same paths, types and error form, real HTTP.

It keeps models, nodes, keys and jobs in memory, honours Idempotency-Key, and takes faults: `fail_next` makes the next
requests of a path fail in a chosen way. Jobs go through the views that a test gives in `scripts`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from herder import types

TOKEN = "hdr_admin_key-1_0123456789abcdef0123456789abcdef"
NOW_MS = 1_790_000_000_000
JOB = "job-000000000001"


def model(name: str, **changes: Any) -> types.ModelView:
    """A registered model."""
    base = types.ModelView(
        name=name,
        type="llm",
        revision="main",
        sources=("file:///srv/models/a.gguf",),
        metadata={},
        detected={},
        format="",
        size=0,
        files=0,
        digest="",
        locations=(),
        services={},
        copies=(),
        created_ms=NOW_MS,
        updated_ms=NOW_MS,
    )
    return msgspec.structs.replace(base, **changes)


def step(state: types.StepState = "running", **changes: Any) -> types.StepView:
    """A step of a job."""
    base = types.StepView(
        id="download",
        action="download",
        model="smollm2",
        devices=("n1:disk",),
        dependencies=(),
        state=state,
        attempts=1,
        started_ms=NOW_MS,
    )
    return msgspec.structs.replace(base, **changes)


def job(status: types.JobState, *steps: types.StepView, id: str = JOB) -> types.JobView:
    """A job of the steps."""
    return types.JobView(
        id=id,
        name="download smollm2",
        description="",
        status=status,
        priority=0,
        actor="first-admin(key-1)",
        created_ms=NOW_MS,
        started_ms=NOW_MS,
        ended_ms=NOW_MS + 2_000 if status in ("completed", "failed", "cancelled") else None,
        steps=steps or (step("completed" if status == "completed" else "running"),),
    )


class ApiDouble:
    """The double. `requests` holds (method, path with query, headers) of what came; `url` once it is started."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: list[bytes] = []
        self.models: dict[str, types.ModelView] = {}
        self.nodes: list[types.NodeView] = []
        self.scripts: dict[str, deque[types.JobView]] = {}
        self.events: list[types.Event] = []
        self.log_pieces: list[bytes] = [b"one\n", b"two\n"]
        self.log_entries: list[types.LogEntry] = []  # of /logs; cursors are counted by the double
        self.log_breaks: list[int] = []  # after so many entries the connection of the n-th reader breaks
        self.chat_lines: list[str] = []
        self.chat_hold: asyncio.Event | None = None  # the end of a chat answer waits for it
        self.was_chat_left = False  # the client was gone by then
        self._news = asyncio.Event()
        self._handlers: set[asyncio.Task[Any]] = set()
        self._answers: dict[str, bytes] = {}
        self._faults: dict[str, deque[str | int]] = {}
        self._runner: web.AppRunner | None = None

    # what tests do
    def fail_next(self, path: str, *faults: str | int) -> None:
        """The next requests of a path: a status, "cut" (no answer), "lost" (done, but no answer) or "hang"."""
        self._faults.setdefault(path, deque()).extend(faults)

    def publish(self, *events: types.Event) -> None:
        """Adds to the change feed."""
        self.events.extend(events)
        self._news.set()
        self._news = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition that requests bring about."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the condition is the test's own
                await asyncio.sleep(0.01)

    def count(self, method: str, path: str) -> int:
        """How often a path was asked, whatever its query."""
        return sum(one == method and where.partition("?")[0] == path for one, where, _ in self.requests)

    async def start(self) -> ApiDouble:
        """Listens on a free port of the loopback."""
        app = web.Application(middlewares=[self._door])
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def stop(self) -> None:
        """Ends."""
        assert self._runner is not None
        for task in self._handlers:
            task.cancel()
        await self._runner.cleanup()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    # how it answers
    @web.middleware
    async def _door(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.requests.append((request.method, request.rel_url.raw_path_qs, dict(request.headers)))
        self.bodies.append(await request.read())
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _error(401, "unauthenticated", "no usable token was sent")
        faults = self._faults.get(request.rel_url.raw_path)
        fault = faults.popleft() if faults else None
        if isinstance(fault, int):
            return _error(fault, "unavailable" if fault == 503 else "internal", "as the test wished")
        if fault == "hang":
            await asyncio.sleep(30)
        if fault is None:
            return await handler(request)
        if fault == "lost":
            await handler(request)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.raw_path.removeprefix("/api/v1")
        key = request.headers.get("Idempotency-Key", "")
        if key and key in self._answers:
            return web.Response(body=self._answers[key], content_type="application/json")
        streams = {
            "/logs": self._entries,
            "/events": self._events,
            "/backup": self._backup,
            "/v1/chat/completions": self._chat,
        }
        if path in streams:
            return await streams[path](request)
        if path.endswith("/logs"):
            return await self._logs(request)
        response = self._resource(request.method, path, request, self.bodies[-1])
        if key and isinstance(response.body, bytes):
            self._answers[key] = response.body
        return response

    def _resource(self, method: str, path: str, request: web.Request, body: bytes) -> web.Response:
        match (method, *path.strip("/").split("/")):
            case ("GET", "health"):
                return _json(_health(self))
            case ("GET", "models"):
                return _page(list(self.models.values()), request)
            case ("POST", "models"):
                wanted = msgspec.json.decode(body, type=types.RegisterModel)
                if wanted.name in self.models:
                    return _error(409, "already_exists", f"{wanted.name} is there already")
                self.models[wanted.name] = model(wanted.name, type=wanted.type, sources=wanted.sources)
                return _json(self.models[wanted.name], 201)
            case ("GET", "models", name):
                found = self.models.get(name.replace("%2F", "/"))
                return (
                    _json(found) if found else _error(404, "model_not_found", f"no model {name!r}", "did you mean 'a'?")
                )
            case ("GET", "nodes"):
                return _page(self.nodes, request)
            case ("POST", "jobs" | "download" | "move" | "copy" | "serve" | "delete" | "stop" | "health_check"):
                return _json(self.scripts[JOB][0] if JOB in self.scripts else job("pending"), 202)
            case ("POST", "jobs", job_id, "cancel"):
                return _json(job("cancelled", id=job_id))
            case ("GET", "jobs", job_id) if job_id in self.scripts:
                script = self.scripts[job_id]
                return _json(script.popleft() if len(script) > 1 else script[0])
            case ("GET", "garbage"):
                return web.Response(text="<html>a proxy</html>", content_type="text/html")
            case _:
                return _error(404, "not_found", f"there is nothing at {path}")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        after = int(request.query.get("after", len(self.events)))
        kinds = request.query.get("kind", "")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": hello\n\n")
        while True:
            news = self._news
            for event in [one for one in self.events if one.id > after]:
                after = event.id
                if event.what == "cut_here":
                    self.events.remove(event)
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if not kinds or event.kind in kinds.split(","):
                    data = msgspec.json.encode(event)
                    await response.write(b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.what.encode(), data))
            await news.wait()

    async def _entries(self, request: web.Request) -> web.StreamResponse:
        """Entries after the cursors that come, each with its own; then the end, unless the connection breaks before."""
        query = await request.json() if request.method == "POST" else request.query
        known = dict(cursor.rsplit("/", 2)[::2] for cursor in filter(None, query.get("cursor", "").split(",")))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        await response.write(b'{"cursor":"*/0/1"}\n')
        for source, node in dict.fromkeys((entry.source, entry.node) for entry in self.log_entries):
            cursor = f"{source}@{node}/0/{known.get(f'{source}@{node}', 0)}"
            begin = types.LogEntry(source=source, node=node, cursor=cursor)
            await response.write(msgspec.json.encode(begin) + b"\n")
        breaks_after = self.log_breaks.pop(0) if self.log_breaks else -1
        counts: Counter[str] = Counter()
        given = 0
        for entry in self.log_entries:
            name = f"{entry.source}@{entry.node}"
            counts[name] += 1
            if counts[name] <= int(known.get(name, 0)):
                continue
            if given == breaks_after:
                await response.write(b'{"source":"half of an en')
                assert request.transport is not None
                request.transport.abort()
                return response
            given += 1
            data = msgspec.json.encode(msgspec.structs.replace(entry, cursor=f"{name}/0/{counts[name]}"))
            await response.write(data + b"\n")
        await response.write(b'{"is_end":true}\n')
        return response

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        for piece in self.log_pieces:
            await response.write(piece)
            await asyncio.sleep(0)
        return response

    async def _backup(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"SQLite format 3\0" + bytes(100_000))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for line in self.chat_lines:
            await response.write(f"data: {line}\n\n".encode())
        if self.chat_hold is not None:
            await self.chat_hold.wait()
            self.was_chat_left = request.transport is None or request.transport.is_closing()
        return response


def _health(double: ApiDouble) -> types.Health:
    return types.Health(
        status="healthy",
        version="0.1.0",
        cluster_id="cluster-1",
        head_epoch=3,
        is_settling=False,
        is_read_only=False,
        nodes=len(double.nodes),
        nodes_online=len(double.nodes),
        models=len(double.models),
        services=0,
        jobs_running=0,
        uptime_s=75.0,
    )


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _page(items: list[Any], request: web.Request) -> web.Response:
    start, limit = int(request.query.get("cursor", "0")), int(request.query.get("limit", "100"))
    part = items[start : start + limit]
    following = str(start + limit) if start + limit < len(items) else None
    return _json({"items": part, "next": following, "total": len(items)})


def _error(status: int, code: str, message: str, hint: str = "") -> web.Response:
    return _json(types.ErrorAnswer(types.ErrorDetail(code, message, hint)), status)
