"""An agent's runs with everything real but link, mover and holder: core, ledger, processes, a target, a head's door."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from agent import procs
from agent.core import effects as fx
from agent.core import events as ev
from agent.core.state import State, load
from agent.driver import Driver
from agent.ledger import Ledger
from agent.runs.directory import RunDirectories, RunDirectory
from agent.runs.service import Runs
from agent.runs.upload import Uploader
from agent.tls import TlsConfig
from common import wire
from common.bench.outcome import Asked, Outcome, decode
from common.clock import SystemClock
from common.tasks import Supervisor
from tests.doubles.ws_head import TOKEN, until

RUN = "b1.0.0"


class Door:
    """The head's door for files of runs, and beside it a server that load goes to; in a thread of their own."""

    def __init__(self) -> None:
        self.port = 0
        self.files: dict[str, bytes] = {}  # "run/name" -> what was taken
        self.puts: list[str] = []  # every attempt
        self.answers: list[int] = []  # statuses of the next attempts; then everything is taken
        self.asked: list[dict[str, str]] = []  # headers of the requests of load
        self._runner: web.AppRunner | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Door:
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self) -> None:
        """Listens; again on the same port after `close`."""
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)

    def close(self) -> None:
        """Is gone."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)

    async def _open(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_put("/api/v1/agent/runs/{run}/artifacts/{name}", self._put)
        app.router.add_route("*", "/work", self._work)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def _put(self, request: web.Request) -> web.Response:
        key = f"{request.match_info['run']}/{request.match_info['name']}"
        self.puts.append(key)
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        data = await request.read()
        assert int(request.headers["Content-Length"]) == len(data)
        assert request.headers["X-Content-SHA256"] == hashlib.sha256(data).hexdigest()
        status = self.answers.pop(0) if self.answers else 200
        if status != 200:
            return web.json_response({"error": {"code": "in_use", "message": "not now"}}, status=status)
        self.files[key] = data
        return web.json_response({})

    async def _work(self, request: web.Request) -> web.Response:
        self.asked.append(dict(request.headers))
        return web.Response(text="ok")

    def measured(self, run: str = RUN) -> tuple[Asked, Outcome]:
        """The result that a run sent."""
        return decode(self.files[f"{run}/load.bin"])


class Rig:
    """See the module's first lines. One agent process; make another over the same root for the next."""

    def __init__(
        self, root: Path, door: Door, *, file_roots: tuple[str, ...], allow_link_local: bool, tls: TlsConfig
    ) -> None:
        self.door = door
        self.tasks = Supervisor("rig")
        self.ledger = Ledger(root / "ledger.db")
        self.state = load(State(), self.ledger.load())
        self.driver = Driver(self.state, self.ledger, SystemClock(), self.release)
        self.files = RunDirectories(root / "runs")
        self.ticks: list[wire.RunTick] = []
        self.sent: list[wire.Message] = []
        self.runs = Runs(
            self.files,
            self.driver.post,
            self.tasks,
            Uploader(door.url, lambda: TOKEN, tls=None, rng=random.Random(1)),
            send_tick=self.ticks.append,
            file_roots=file_roots,
            allow_link_local=allow_link_local,
            tls=tls,
        )

    def release(self, effect: fx.Effect) -> None:
        """Performs what concerns runs."""
        match effect:
            case fx.SendMessage():
                self.sent.append(effect.message)
            case fx.RunEffect():
                self.runs.perform(effect)
            case _:
                pass

    def order(self, run: str = RUN, spec: dict[str, Any] | None = None, **fields: Any) -> wire.EnsureRun:
        """Plain HTTP load on the door's own server."""
        plain = {"api": "http", "method": "GET", "arrivals": "constant", "rate": 50, "duration": 1.0}
        values: dict[str, Any] = {"urls": (f"{self.door.url}/work",), **fields}
        return wire.EnsureRun(run, "load", {**plain, **(spec or {})}, **values)

    def command(self, body: wire.AnyCommand, generation: int = 1) -> None:
        """A command of the head."""
        op_id = {wire.EnsureRun: "run", wire.FireRun: "fire", wire.EndRun: "end"}[type(body)]
        name = f"{op_id}:{body.run}"  # type: ignore[union-attr]
        self.driver.post(ev.CommandReceived(wire.Command(name, generation, 1, "job-1", body)))

    async def is_in(self, state: str, run: str = RUN) -> None:
        """Waits until a run is in a state."""
        await until(
            lambda: run in self.state.runs and self.state.runs[run].state == state,
            f"{run} {state}, not {self.state.runs.get(run)}",
        )

    async def armed(self, run: str = RUN, spec: dict[str, Any] | None = None, **fields: Any) -> None:
        """Orders a run and waits until it is armed."""
        self.command(self.order(run, spec, **fields))
        await self.is_in("armed", run)

    async def result(self, op_id: str = f"run:{RUN}", generation: int = 1) -> wire.Result:
        """Waits for a result."""
        found: list[wire.Result] = []

        def look() -> bool:
            found[:] = [
                message
                for message in self.sent
                if isinstance(message, wire.Result) and (message.op_id, message.generation) == (op_id, generation)
            ]
            return bool(found)

        await until(look, f"the result of {op_id}; {self.state.runs}")
        return found[0]

    def directory(self, run: str = RUN) -> RunDirectory:
        """A run's directory."""
        return self.files.of(run)

    def members(self, run: str = RUN) -> list[int]:
        """Every process of a run."""
        return [process.pid for process in procs.members(0, self.files.mark(run))]


@asynccontextmanager
async def rig(
    root: Path,
    door: Door,
    *,
    file_roots: tuple[str, ...] = (),
    allow_link_local: bool = False,
    boot_id: str = "",
    tls: TlsConfig | None = None,
) -> AsyncIterator[Rig]:
    """An agent's runs; leaving it is what the end of an agent process is to them."""
    os.makedirs(root, exist_ok=True)
    made = Rig(root, door, file_roots=file_roots, allow_link_local=allow_link_local, tls=tls or TlsConfig())
    await made.runs.start(set(made.state.runs))
    made.tasks.start("driver", made.driver.run())
    made.driver.post(ev.AgentStarted(boot_id or procs.boot_id(), str(root / "store/models")))
    made.driver.post(ev.SessionOpened("s", "n1", wire.Welcome(1, "c", 1, "s", 60_000, 5_000, 0, "")))
    try:
        yield made
    finally:
        await made.tasks.close()
        made.runs.close()
        made.driver.close()
        made.ledger.close()
        assert not made.tasks.failures, made.tasks.failures
