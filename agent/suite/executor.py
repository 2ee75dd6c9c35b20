"""The executor's HTTP face: /health /start /status /metrics /metrics/prometheus /stop, as the toolkit's document has
them and as its code had them, both at once. The load itself is sent by a child process (`agent.suite.generator`); this
one only answers, so that scraping never delays a request that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from agent.suite import figures as forms
from agent.suite import workload
from agent.suite.executors import BaseWorkloadExecutor
from agent.suite.figures import Figures

MAX_BODY = 1 << 20
MAX_LINE = 256 << 20
ARM_LIMIT_S = 150.0
STOP_LIMIT_S = 10.0
KEPT_STDERR = 4_000
TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Settings:
    """How an executor works."""

    token: str | None
    """None: anybody who reaches the port may use it."""
    file_roots: tuple[Path, ...] = ()
    plugins: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    """Sent with every request of the load."""
    ca_file: str | None = None


@dataclass(slots=True)
class Run:
    """One workload."""

    config: dict[str, Any]
    plan: workload.Plan
    process: asyncio.subprocess.Process
    began: float
    figures: Figures
    phase: str = "preparing"
    armed: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    said: str = ""
    error: str | None = None
    report: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    in_flight: dict[int, int] = field(default_factory=dict)
    ended: float | None = None
    is_stopped: bool = False
    stderr: str = ""

    @property
    def is_running(self) -> bool:
        """Whether its process still works."""
        return not self.over.is_set()

    @property
    def elapsed_s(self) -> float:
        """Since it was started, the warm-up included."""
        return (self.ended if self.ended is not None else time.monotonic()) - self.began


class Executor:
    """Serves one service's executor; at most one workload at a time."""

    def __init__(self, executor: BaseWorkloadExecutor, settings: Settings) -> None:
        self.executor, self.settings = executor, settings
        self.service = executor.get_service_name()
        self._run: Run | None = None
        self._is_starting = False
        self._starting: Run | None = None
        self._is_unwanted = False
        """Whether a stop came for the workload that is starting."""
        self._folder = Path(tempfile.mkdtemp(prefix="herder-executor-"))
        self._tasks: set[asyncio.Task[None]] = set()
        self._host = os.uname().nodename

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.post("/start", self._start),
                web.get("/status", self._status),
                web.get("/metrics", self._metrics),
                web.get("/metrics/prometheus", self._prometheus),
                web.get("/result", self._result),
                web.post("/stop", self._stop),
            ]
        )
        app.on_cleanup.append(self._end)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """/health says nothing that needs a token; everything else asks for it, and every error is JSON."""
        token = self.settings.token
        if token is not None and request.path != "/health":
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(
                given.strip().encode(errors="surrogateescape"), token.encode()
            ):
                said = "send the executor's token as `Authorization: Bearer ...`"
                return _refused(401, said, {"WWW-Authenticate": "Bearer"})
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _refused(error.status, error.reason)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "service": self.service})

    async def _start(self, request: web.Request) -> web.Response:
        try:
            config = json.loads(await request.read() or b"null")
        except (ValueError, RecursionError):
            return _refused(400, "the body is not JSON")
        if not config:
            return _refused(400, "No workload configuration provided")
        if not isinstance(config, dict):
            return _refused(400, "a workload configuration is an object")
        if self._is_starting or (self._run is not None and self._run.is_running):
            return _refused(400, "Workload already running")
        self._is_starting, self._is_unwanted = True, False
        try:
            run = await self._begin(config)
        except (ValueError, TypeError, OverflowError) as error:
            return _refused(400, str(error))
        finally:
            self._is_starting, self._starting = False, None
        return web.json_response(
            {
                "status": "started",
                "threads": run.figures.threads,
                "success": True,
                "message": "Workload started",
                "ignored": list(run.plan.ignored),
            }
            | run.facts
        )

    async def _begin(self, config: dict[str, Any]) -> Run:
        """Starts the generator and waits until it sends. Raises: ValueError that says what to change."""
        plan = workload.plan_of(config)
        (self._folder / "load.bin").unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "agent.suite.generator",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE, start_new_session=True,
        )  # fmt: skip
        run = self._starting = Run(config, plan, process, time.monotonic(), Figures(threads=plan.slots or 1))
        order = {
            "executor": self.executor.reference,
            "plugins": list(self.settings.plugins),
            "config": config,
            "file_roots": [str(root) for root in self.settings.file_roots],
            "headers": list(self.settings.headers),
            "ca_file": self.settings.ca_file,
            "result": str(self._folder / "load.bin"),
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        self._follow(self._listen(run))
        if self._is_unwanted:
            _end_group(process)
        waits = [asyncio.ensure_future(event.wait()) for event in (run.armed, run.over)]
        try:
            await asyncio.wait(waits, timeout=ARM_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if self._is_unwanted:
            await self._kill(run)
            raise ValueError("the workload was stopped before it began")
        if not run.armed.is_set():
            await self._kill(run)
            raise ValueError(run.said or run.error or f"the load was not ready within {ARM_LIMIT_S:g} s")
        self._run = run
        return run

    def _follow(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, run: Run) -> None:
        """Takes what the generator says, to its end."""
        process = run.process
        assert process.stdout is not None
        assert process.stderr is not None
        errors = asyncio.create_task(_tail(process.stderr))
        try:
            while line := await process.stdout.readline():
                self._take(run, json.loads(line))
            code = await process.wait()
            run.stderr = await errors
            if run.phase != "done" and run.error is None and not run.said:
                tail = run.stderr.strip().splitlines()[-1:] or [""]
                run.error = f"the load generator ended with code {code}: {tail[0][:300]}"
        except (ValueError, KeyError, TypeError) as error:
            run.error = f"the load generator cannot be understood: {type(error).__name__}: {error}"
        finally:
            errors.cancel()
            if process.returncode is None:
                _end_group(process)
            if run.phase != "done":
                run.phase = "failed"
            run.ended = time.monotonic()
            run.over.set()

    def _take(self, run: Run, message: dict[str, Any]) -> None:
        match message["kind"]:
            case "armed":
                run.facts = {
                    "start_wall_s": message["start_wall_s"],
                    "digest": message["digest"],
                    "schedule": message["schedule"],
                }
                run.began = time.monotonic()
                run.phase = "warmup" if run.plan.warmup_s else "running"
                run.armed.set()
            case "tick":
                run.figures.add_tick(message)
                run.figures.window_s = min(max(0.0, message["at_s"] - run.plan.warmup_s), run.plan.duration_s)
                run.in_flight[message["worker"]] = message["in_flight"]
                if run.figures.window_s > 0 and run.phase == "warmup":
                    run.phase = "running"
                if message["at_s"] >= run.plan.warmup_s + run.plan.duration_s:
                    run.phase = "draining"
            case "done":
                run.figures = Figures.from_wire(message["figures"])
                run.report, run.notes = message["report"], message.get("notes") or []
                run.phase = "done"
            case "refused":
                run.said = str(message["said"])
                if run.armed.is_set():
                    run.error = run.said

    async def _status(self, request: web.Request) -> web.Response:
        run = self._run
        if run is None:
            return web.json_response(
                {
                    "running": False,
                    "elapsed_seconds": 0.0,
                    "threads_active": 0,
                    "phase": "idle",
                    "service": self.service,
                }
            )
        return web.json_response(
            {
                "running": run.is_running,
                "elapsed_seconds": run.elapsed_s,
                "threads_active": run.figures.threads if run.is_running else 0,
                "phase": run.phase,
                "in_flight": sum(run.in_flight.values()) if run.is_running else 0,
                "service": self.service,
                "error": run.error,
            }
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        accept = request.headers.get("Accept", "")
        if "text/plain" in accept or request.query.get("format") == "prometheus":
            return await self._prometheus(request)
        return web.json_response(self._measured())

    def _measured(self) -> dict[str, Any]:
        """Everything that is known of the last workload."""
        run = self._run
        found = run.figures if run is not None else Figures()
        config = run.config if run is not None else {}
        elapsed = found.window_s
        flat = forms.flat(found, elapsed_s=elapsed, config=config)
        made = flat | forms.nested(found, elapsed_s=elapsed)
        made |= {
            "running": run is not None and run.is_running,
            "error": run.error if run is not None else None,
            "metrics": flat if run is not None else {},
            "service": self.service,
            "phase": run.phase if run is not None else "idle",
        }
        if run is None:
            return made
        report = run.report or {}
        return (
            made
            | {
                "warmup_seconds": run.plan.warmup_s,
                "part": run.plan.part,
                "parts": run.plan.parts,
                "is_stopped": run.is_stopped,
                "is_valid": report.get("is_valid"),
                "reasons": report.get("reasons", []),
                "warnings": report.get("warnings", []),
                "notes": run.notes,
                "plan": report.get("plan"),
                "error_samples": report.get("error_samples", {}),
                "endpoints": report.get("endpoints", {}),
                "series": report.get("series", []),
                "figures": found.to_wire(),
            }
            | run.facts
        )

    async def _prometheus(self, request: web.Request) -> web.Response:
        run = self._run
        found = run.figures if run is not None else Figures()
        text = forms.prometheus(
            self.service, found, running=run is not None and run.is_running, elapsed_s=found.window_s, host=self._host
        )
        return web.Response(body=text.encode(), headers={"Content-Type": TEXT})

    async def _result(self, request: web.Request) -> web.StreamResponse:
        """Every request of the last workload, as `load.bin` (common.bench.outcome)."""
        path = self._folder / "load.bin"
        if self._run is None or self._run.is_running or not path.exists():
            return _refused(404, "there is no finished run of the load generator")
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    async def _stop(self, request: web.Request) -> web.Response:
        if self._is_starting:
            # Whoever asked for it may be gone: nothing may begin after this answer.
            self._is_unwanted = True
            if self._starting is not None:
                _end_group(self._starting.process)
            return web.json_response(
                {"status": "stopped", "success": True, "message": "Workload stopped", "final_metrics": {}}
            )
        run = self._run
        if run is None or not run.is_running:
            said = {"status": "stopped", "success": True, "message": "No workload running"}
            return web.json_response(said | {"final_metrics": self._measured() if run is not None else {}})
        run.is_stopped = True
        await self._kill(run)
        said = {"status": "stopped", "success": True, "message": "Workload stopped"}
        return web.json_response(said | {"final_metrics": self._measured()})

    async def _kill(self, run: Run) -> None:
        """Stops a run: what was measured is told within STOP_LIMIT_S, or the process is ended without it."""
        if run.process.stdin is not None:
            with contextlib.suppress(OSError):
                run.process.stdin.write(b"stop\n")
                await run.process.stdin.drain()
        try:
            await asyncio.wait_for(run.over.wait(), STOP_LIMIT_S)
        except TimeoutError:
            _end_group(run.process)
            await run.over.wait()

    async def _end(self, app: web.Application) -> None:
        if self._run is not None and self._run.is_running:
            await self._kill(self._run)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def _end_group(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _refused(status: int, said: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"success": False, "error": said}, status=status, headers=headers)


async def _tail(stream: asyncio.StreamReader) -> str:
    """The last characters of what came."""
    kept = b""
    while data := await stream.read(1 << 16):
        kept = (kept + data)[-KEPT_STDERR:]
    return kept.decode(errors="replace")


def serve(
    executor: BaseWorkloadExecutor,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    token_file: str | None = None,
    is_open: bool = False,
    file_roots: Sequence[Path] | None = None,
    plugins: Sequence[str] = (),
    headers: Sequence[str] = (),
    ca_file: str | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT. is_open: no token is asked for. Raises: OSError, HerderConfigError."""
    from agent.suite import tokens

    tell: Callable[[str], None] = say or _to_stderr
    if not is_open and token is None:
        path = tokens.path_of(token_file)
        token, is_new = tokens.read_or_make(path)
        tell(f"token made in {path}: the orchestrator needs the file, too" if is_new else f"token of {path}")
    settings = Settings(
        None if is_open else token,
        tuple(file_roots if file_roots is not None else [Path.cwd()]),
        tuple(plugins),
        tuple(headers),
        ca_file,
    )
    asyncio.run(_serve(Executor(executor, settings), host, executor.port, tell))


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")


async def _serve(made: Executor, host: str, port: int, say: Callable[[str], None]) -> None:
    runner = web.AppRunner(made.application(), access_log=None, shutdown_timeout=STOP_LIMIT_S)
    await runner.setup()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound = runner.addresses[0]
        say(f"executor for {made.service} on http://{host}:{bound[1]}"
            + ("" if made.settings.token is not None else ", without a token"))  # fmt: skip
        await stopped.wait()
    finally:
        await runner.cleanup()
