"""The head as a process: parts are opened in order, and closed in the opposite one.

state directory (lock) -> journal -> state -> driver -> tokens -> API and gateway -> listening. A start that fails
anywhere closes what was opened and ends with one line that says why. A stop closes the door first, tells agents and
readers to come back, finishes what was taken, and closes the journal; engines are not the head's and run on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sqlite3
from collections.abc import Callable
from contextlib import AsyncExitStack
from importlib import metadata
from pathlib import Path

from aiohttp import web

from common import limits
from common.bench.recipe import BenchmarkRecipe, load_benchmarks
from common.clock import SystemClock, boottime_ms
from common.errors import HerderError, Internal, InvalidConfig, InvalidRecipe, StateReadOnly
from common.logs.own import OwnLog
from common.recipe import Recipe, load_recipes
from common.statedir import StateDir, write_secret
from common.tasks import Supervisor
from common.telemetry import Notifier, calm_gc, fields
from head import bootstrap
from head.bench.performer import Performer
from head.bench.store import Store
from head.config import HeadConfig
from head.context import HeadContext, RandomIds
from head.core.events import HeadStarted, RecipesLoaded
from head.door import Door
from head.driver import Driver
from head.feed import Feed
from head.journal import Journal
from head.journal_schema import FILE_NAME
from head.metrics import Metrics
from head.sessions import Sessions

log = logging.getLogger(__name__)
BuildApp = Callable[[HeadContext], web.Application]
DRIVER_END_S = 10.0
IMPATIENCE_MS = 3_000  # a stop signal that comes so long after the first is meant
ENDPOINT_FILE = "endpoint"  # in the state directory: the URL of the running head


def version() -> str:
    """The installed version, or that of a source tree."""
    try:
        return metadata.version("herder")
    except metadata.PackageNotFoundError:
        return "0+source"


def _build_app(context: HeadContext) -> web.Application:
    from head.api.app import build_app  # the API is the largest part; tests of the shell bring a small one

    return build_app(context)


def _gateway_routes(context: HeadContext) -> Callable[[web.Application], None]:
    def attach_gateway(app: web.Application) -> None:
        from head.gateway.app import attach

        attach(app, context)

    return attach_gateway


class Daemon:
    """One run of the head."""

    def __init__(
        self, settings: HeadConfig, *, build_app: BuildApp = _build_app, needs_new_admin: bool = False
    ) -> None:
        self.config = settings
        self.context: HeadContext
        self.url = settings.url
        self._build_app = build_app
        self._needs_new_admin = needs_new_admin
        self._notifier = Notifier()
        self._tasks = Supervisor("head")
        self._stop = asyncio.Event()
        self._stopping_ms = 0

    async def run(self, on_ready: Callable[[], None] | None = None) -> int:
        """Serves until a signal or `stop`; returns the exit code. Raises: HerderError when it cannot start."""
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._hear_signals(stack)
            await self._listen(stack)
            calm_gc()
            self._tasks.start("watch", self._watch())
            self._tasks.start("sweep", self._door.sweep_forever())
            posture = self.posture()
            log.info(posture)
            self._notifier.ready(posture)
            if on_ready is not None:
                on_ready()
            exit_code = await self._until_stopped()
            self._notifier.stopping()
            await self._close_door()
        log.info("head stopped", extra=fields(exit_code=exit_code))
        return exit_code

    def stop(self) -> None:
        """Begins a clean stop."""
        self._stop.set()

    def posture(self) -> str:
        """What is open, to whom, and where state lives, in one line."""
        settings, state = self.config, self.context.driver.state
        now_ms = self.context.clock.now_ms()
        reach = "this machine only" if settings.is_loopback else f"the network ({settings.host})"
        wire = "PLAIN (tokens can be read on the way)"
        if settings.tls.is_on:
            wire = "TLS with client certificates" if settings.tls.client_ca else "TLS"
        elif settings.is_loopback:
            wire = "plain"
        roles = ("admin", "operator", "viewer", "agent", "inference")
        keys = " ".join(f"{role}:{bootstrap.valid_keys(state, role, now_ms)}" for role in roles)
        return (
            f"herder-head {self.context.version} at {self.url}, open to {reach}, {wire}; "
            f"without a token only /healthz, /docs{' and /metrics' if settings.metrics_open else ''} answer; "
            f"keys {keys}; gateway {'on' if settings.gateway.enabled else 'off'}; state in {settings.state_path}; "
            f"cluster {state.cluster_id} epoch {state.head_epoch}, "
            f"{len(state.nodes)} nodes, {len(state.models)} models, {len(state.jobs)} jobs"
        )

    # opening

    async def _open(self, stack: AsyncExitStack) -> None:
        settings = self.config
        started_ms = boottime_ms()
        recipes, recipe_paths = read_recipes(settings)
        benchmark_recipes, benchmark_paths = read_benchmark_recipes(settings)
        owned = StateDir.open(settings.state_path, daemon="herder-head", allow_network_fs=settings.allow_network_fs)
        stack.callback(owned.close)
        kept = settings.logs
        own = OwnLog.start(owned.path, bytes_max=kept.own_bytes_max, age_max_s=kept.age_max_s)
        stack.callback(own.close)
        journal = Journal.open(owned.path / FILE_NAME)
        stack.callback(journal.close)
        state = journal.load()
        epoch_before = state.head_epoch
        clock, ids, feed, metrics = SystemClock(journal.stamp_ms), RandomIds(), Feed(), Metrics(version())
        lines = await journal.history(limit=limits.EVENT_BACKLOG, newest=True)
        feed.prime(lines, is_complete=len(lines) < limits.EVENT_BACKLOG)
        driver = Driver(state, journal, clock, feed)
        sessions = Sessions(driver, clock, ids, is_tls=settings.tls.is_on)
        metrics.attach(driver, journal, sessions, feed)
        performer = driver.performer = Performer(driver, sessions, Store(owned.path))
        metrics.gc_watch.start()
        stack.callback(metrics.gc_watch.stop)
        self.context = HeadContext(
            driver, settings, sessions, journal, feed, metrics, clock, ids, version(), recipe_paths,
            benchmarks=performer, benchmark_paths=benchmark_paths,
        )  # fmt: skip
        if settings.gateway.enabled:
            self.context.gateway_routes = _gateway_routes(self.context)
        await performer.start()
        driver.start(sessions)
        stack.push_async_callback(driver.stop, DRIVER_END_S)
        stack.push_async_callback(performer.close)
        gateway = settings.gateway
        drain_ms = round(gateway.drain_timeout_s * 1000) if gateway.enabled else 0
        driver.post(
            HeadStarted(
                ids.fresh("cluster"),
                secrets.token_bytes(32),
                recipes,
                drain_ms,
                benchmark_recipes=benchmark_recipes,
                gateway_url=settings.reachable_url if gateway.enabled else "",
                version=version(),
            )
        )
        await driver.settled()
        if driver.is_read_only:
            raise StateReadOnly("the journal cannot be written", hint="is there space on the head's disk?")
        if state.head_epoch <= epoch_before:
            raise Internal("the start was not recorded; the log says why")
        await bootstrap.ensure_tokens(driver, ids, owned.path)
        if self._needs_new_admin:
            await bootstrap.new_admin_token(driver, ids, owned.path)
        log.info(
            "state loaded",
            extra=fields(
                ms=boottime_ms() - started_ms,
                revision=state.revision,
                was_clean=journal.was_clean,
                sqlite=sqlite3.sqlite_version,
            ),
        )

    async def _listen(self, stack: AsyncExitStack) -> None:
        self._door = Door(self.config, self._build_app(self.context))
        stack.push_async_callback(self._door.close)
        await self._door.open()
        registry, crowd = self.context.metrics.registry, self._door.crowd
        registry.register(crowd)
        stack.callback(registry.unregister, crowd)
        self.url = self._door.url
        endpoint = self.config.state_path / ENDPOINT_FILE
        write_secret(endpoint, self.url)
        stack.callback(endpoint.unlink, missing_ok=True)

    def _hear_signals(self, stack: AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError, RuntimeError):  # only the main thread may; tests run beside it
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_stop_signal, number)
                stack.callback(loop.remove_signal_handler, number)
            loop.add_signal_handler(signal.SIGHUP, self._reload_recipes)
            stack.callback(loop.remove_signal_handler, signal.SIGHUP)

    # running

    def _on_stop_signal(self, number: int) -> None:
        if self._stop.is_set():
            if boottime_ms() - self._stopping_ms > IMPATIENCE_MS:
                log.error("told to stop again; ending at once", extra=fields(signal=number))
                os._exit(1)
            return  # Ctrl-C reaches us twice: from the terminal and from `herder up`
        self._stopping_ms = boottime_ms()
        log.info("stopping", extra=fields(signal=signal.Signals(number).name))
        self._stop.set()

    def _reload_recipes(self) -> None:
        try:
            recipes, paths = read_recipes(self.config)
            benchmark_recipes, benchmark_paths = read_benchmark_recipes(self.config)
        except HerderError as error:
            log.error("recipes were not reloaded", extra=fields(why=error.message))
            return
        self.context.recipe_paths.clear()
        self.context.recipe_paths.update(paths)
        self.context.benchmark_paths.clear()
        self.context.benchmark_paths.update(benchmark_paths)
        self.context.driver.post(RecipesLoaded(recipes, benchmark_recipes))
        log.info("recipes reloaded", extra=fields(recipes=len(recipes), benchmarks=len(benchmark_recipes)))

    async def _watch(self) -> None:
        """Feeds systemd's watchdog for as long as the driver handles its ticks."""
        period_s = min(1.0, self._notifier.watchdog_s / 4) if self._notifier.watchdog_s else 1.0
        while True:
            await asyncio.sleep(period_s)
            if boottime_ms() - self.context.driver.last_tick_boottime_ms < 10 * limits.TICK_MS:
                self._notifier.alive()

    async def _until_stopped(self) -> int:
        stopped = self._tasks.start("stopped", self._stop.wait())
        failed = self._tasks.start("failed", self.context.driver.tasks.failed())
        await asyncio.wait((stopped, failed), return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            log.critical("a part of the head failed; the head ends", extra=fields(task=failed.result().name))
            return 1
        return 0

    # closing

    async def _close_door(self) -> None:
        await self._door.shut()
        self.context.feed.close()
        self.context.sessions.live.close()
        await self.context.sessions.close()
        await self._tasks.close()


def read_recipes(settings: HeadConfig) -> tuple[dict[str, Recipe], dict[str, str]]:
    """The recipes by name, and where each was read. Raises: InvalidRecipe, InvalidConfig."""
    root: Path = settings.recipes_path
    if not root.is_dir():
        raise InvalidConfig(f"recipes_dir: {root} is not a folder")
    try:
        found = load_recipes(root)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"{root}: {error}") from None
    return {name: recipe for name, (recipe, _) in found.items()}, {name: path for name, (_, path) in found.items()}


def read_benchmark_recipes(settings: HeadConfig) -> tuple[dict[str, BenchmarkRecipe], dict[str, str]]:
    """The benchmark recipes by name, and where each was read. Raises: InvalidRecipe."""
    root: Path = settings.recipes_path / "benchmark"
    try:
        found = load_benchmarks(root) if root.is_dir() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"{root}: {error}") from None
    paths = {name: f"benchmark/{path}" for name, (_, path) in found.items()}
    return {name: recipe for name, (recipe, _) in found.items()}, paths
