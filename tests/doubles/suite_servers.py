"""Ollama and vLLM as a suite sees them: their health, models, pulls and answers, over real sockets; and executors as
the processes that they are."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from agent.suite.asking import ask, ask_json
from tests.doubles.herder_program import HERDER


@dataclass
class Stub:
    """One engine's API. What came is kept: (path, body, time)."""

    service: str
    models: list[str] = field(default_factory=list)
    pull_fails: bool = False
    is_healthy: bool = True
    answer_s: float = 0.005
    port: int = 0
    seen: list[tuple[str, Any, float]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def asked(self, path: str) -> list[Any]:
        """Bodies of the requests to a path."""
        return [body for where, body, _ in self.seen if where == path]

    def application(self) -> web.Application:
        """The routes of its service."""
        app = web.Application(middlewares=[self._note])
        if self.service == "ollama":
            app.add_routes([web.get("/api/tags", self._tags), web.post("/api/pull", self._pull),
                            web.post("/api/chat", self._chat)])  # fmt: skip
        else:
            app.add_routes([web.get("/health", self._health), web.get("/v1/models", self._served),
                            web.post("/v1/completions", self._complete),
                            web.post("/v1/chat/completions", self._complete)])  # fmt: skip
        return app

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.seen.append((request.path, body, time.monotonic()))
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _tags(self, request: web.Request) -> web.Response:
        return web.json_response({"models": [{"name": name} for name in self.models]})

    async def _pull(self, request: web.Request) -> web.StreamResponse:
        name = (await request.json())["model"]
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await answer.prepare(request)
        lines: list[dict[str, Any]] = [{"status": "pulling manifest"}, {"error": "no such model"}]
        if not self.pull_fails:
            lines = [{"status": "downloading", "total": 10, "completed": done} for done in (0, 5, 10)]
            lines.append({"status": "success"})
            self.models.append(f"{name}:latest")
        for line in lines:
            await answer.write(json.dumps(line).encode() + b"\n")
        await answer.write_eof()
        return answer

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await answer.prepare(request)
        count = asked["options"]["num_predict"]
        await asyncio.sleep(self.answer_s)
        for _ in range(count):
            await answer.write(json.dumps({"message": {"content": "w"}, "done": False}).encode() + b"\n")
        last = {"done": True, "prompt_eval_count": 7, "eval_count": count, "message": {"content": ""}}
        await answer.write(json.dumps(last).encode() + b"\n")
        await answer.write_eof()
        return answer

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_healthy else 503)

    async def _served(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        count = asked["max_tokens"]
        await asyncio.sleep(self.answer_s)
        for number in range(count):
            piece: dict[str, Any] = {"index": 0, "finish_reason": "length" if number == count - 1 else None}
            piece |= {"delta": {"content": "w"}} if "messages" in asked else {"text": "w"}
            await answer.write(b"data: " + json.dumps({"choices": [piece]}).encode() + b"\n\n")
        usage = {"prompt_tokens": 7, "completion_tokens": count}
        await answer.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        await answer.write_eof()
        return answer


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """Serves on loopback in a thread of its own."""
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(stub.application(), access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stub.port = runner.addresses[0][1]
        return runner

    def work() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)


@dataclass
class ExecutorProcess:
    """`herder executor` as it is started on a client node."""

    process: subprocess.Popen[str]
    port: int
    token: str | None

    @property
    def node(self) -> str:
        """As --client-nodes takes it."""
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        """Of a route."""
        return f"http://127.0.0.1:{self.port}{path}"

    def call(self, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, dict[str, Any]]:
        """(status, JSON), with the right token unless another is given."""
        return ask_json(method, self.url(path), body=body, token=token if token is not None else self.token,
                        timeout_s=60)  # fmt: skip

    def text(self, path: str) -> str:
        """An answer as text."""
        status, data = ask("GET", self.url(path), token=self.token)
        assert status == 200, data
        return data.decode()

    def wait_over(self, limit_s: float = 60) -> dict[str, Any]:
        """The metrics once nothing runs."""
        found: dict[str, Any] = until(
            lambda: (said := self.call("GET", "/metrics")[1])["running"] is False and said, limit_s
        )
        return found


def until(found: Any, limit_s: float = 30) -> Any:
    """The first true value of a function. Raises: AssertionError."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("did not become true in time")


@contextmanager
def executor(
    folder: Path, *, service: str = "vllm", arguments: tuple[str, ...] = (), variables: dict[str, str] | None = None
) -> Iterator[ExecutorProcess]:
    """An executor on a free port, with its token below the folder."""
    own = {"HERDER_EXECUTOR_TOKEN_FILE": str(folder / "executor.token"), "TMPDIR": str(folder)}
    environment = os.environ | own | (variables or {})
    process = subprocess.Popen(
        [*HERDER, "executor", "--service", service, "--port", "0", *arguments],
        stderr=subprocess.PIPE, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    assert process.stderr is not None
    port, said = 0, ""
    while not port:
        line = process.stderr.readline()
        said += line
        assert line, f"the executor ended: {said}"
        found = re.search(r"http://[^:]+:(\d+)", line)
        port = int(found[1]) if found else 0
    drain = threading.Thread(target=process.stderr.read, daemon=True)
    drain.start()
    token_file = folder / "executor.token"
    try:
        yield ExecutorProcess(process, port, token_file.read_text().strip() if token_file.exists() else None)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)
        drain.join(20)
        process.stderr.close()


def herder(*arguments: str, folder: Path, variables: dict[str, str] | None = None, limit_s: float = 120) -> Any:
    """A finished `herder` command."""
    environment = os.environ | {"HERDER_EXECUTOR_TOKEN_FILE": str(folder / "executor.token"),
                                "OUTPUT_DIR": str(folder / "out")} | (variables or {})  # fmt: skip
    return subprocess.run(
        [*HERDER, *arguments], capture_output=True, text=True, env=environment, cwd=folder, timeout=limit_s, check=False
    )
