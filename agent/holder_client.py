"""Connects to the holder of the RAM tier, starting it where none runs. The holder outlives this process."""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from agent import holder_protocol as protocol
from agent.core import events as ev
from agent.frames import BrokenFrame, read_frame
from agent.mover_client import child_env
from common import limits
from common.backoff import full_jitter_ms
from common.clock import boottime_ms
from common.errors import Unavailable
from common.telemetry import fields

log = logging.getLogger(__name__)
START_TIMEOUT_S = 20.0
STABLE_MS = 60_000


class HolderClient:
    """One connection at a time. `budget_bytes`, `tmpfs`: what a holder that is started here may hold, and where."""

    def __init__(
        self,
        socket_path: Path,
        post: Callable[[ev.Event], None],
        *,
        budget_bytes: int,
        tmpfs: str = "",
        rng: random.Random | None = None,
        command: tuple[str, ...] = (sys.executable, "-P", "-m", "agent.holder"),
    ) -> None:
        self.used_bytes = 0
        self.budget_bytes = 0
        self.pid = 0
        self.starts = 0
        self.why_unlocked = ""
        self.last_error = ""
        self.is_ready = asyncio.Event()
        self._socket_path = socket_path
        self._log_path = socket_path.with_suffix(".log")
        self._came_up = False
        self._post = post
        self._rng = rng or random.Random()
        self._command = (*command, "--socket", str(socket_path), "--budget", str(budget_bytes))
        self._mode = "tmpfs" if tmpfs else "cache"
        if tmpfs:
            self._command += ("--tmpfs", tmpfs)
        self._writer: asyncio.StreamWriter | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def send(self, request: protocol.Request) -> None:
        """Sends a request; dropped when not connected (the core asks again)."""
        if self._writer is not None and self.is_ready.is_set():
            self._writer.write(protocol.frame(request))

    async def run(self) -> None:
        """Keeps a connection until cancelled; the holder stays."""
        attempt = 0
        while True:
            started_ms = boottime_ms()
            self._came_up = False
            try:
                await self._run_once()
                self.last_error = "its socket was closed"
            except (OSError, BrokenFrame, TimeoutError) as error:
                self.last_error = str(error)[:300] or type(error).__name__
            if not self._came_up:
                reason = f"this node's RAM tier does not start: {self.last_error}"
                self._post(ev.HolderFailed(Unavailable(reason, hint=f"{self._log_path} says more").info()))
            attempt = 1 if boottime_ms() - started_ms > STABLE_MS else attempt + 1
            log.error("the holder is not there", extra=fields(error=self.last_error, attempt=attempt))
            delay_ms = full_jitter_ms(
                attempt, base_ms=limits.CHILD_BACKOFF_BASE_MS, cap_ms=limits.CHILD_BACKOFF_CAP_MS, rng=self._rng
            )
            await asyncio.sleep(delay_ms / 1000)

    async def _run_once(self) -> None:
        reader, writer = await self._connect()
        self._writer = writer
        was_ready = False
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                hello = await read_frame(reader, protocol.answers)
            if not isinstance(hello, protocol.Ready):
                raise BrokenFrame("the first frame is not Ready")
            self.pid, self.budget_bytes, self.why_unlocked = hello.pid, hello.budget_bytes, hello.why_unlocked
            if hello.why_unlocked:
                log.warning("the RAM tier cannot lock memory", extra=fields(why=hello.why_unlocked))
            if hello.mode != self._mode:
                log.warning(
                    "the running holder keeps its mode until it is stopped",
                    extra=fields(mode=hello.mode, configured=self._mode),
                )
            writer.write(protocol.frame(protocol.List("list")))
            while (answer := await read_frame(reader, protocol.answers)) is not None:
                if isinstance(answer, protocol.Moving):
                    self._post(ev.HolderMoved(answer))
                elif isinstance(answer, protocol.Done):
                    self.used_bytes, self.budget_bytes = answer.used_bytes, answer.budget_bytes
                    if answer.token == "list":  # noqa: S105 - a request's token
                        was_ready = self._came_up = True
                        self._post(ev.HolderReady(answer.holdings))
                        self.is_ready.set()
                    else:
                        self._post(ev.HolderDone(answer))
        finally:
            self._writer = None
            self.is_ready.clear()
            writer.close()
            if was_ready:
                self._post(ev.HolderDied(self.last_error))

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the holder that runs, else to one that is started now."""
        try:
            return await self._open()
        except OSError:
            pass  # none runs; a socket file of a dead one is replaced by the new one
        if self._process is not None and self._process.poll() is None:
            raise OSError("a holder was started but does not listen yet")
        self.starts += 1
        self._process = await asyncio.to_thread(self._start)
        deadline_ms = boottime_ms() + int(START_TIMEOUT_S * 1000)
        while True:
            try:
                return await self._open()
            except OSError:
                code = self._process.poll()
                if code is not None:
                    said = await asyncio.to_thread(self._last_line)
                    raise OSError(f"the holder ended with {code} at start{said and f': {said}'}") from None
                if boottime_ms() > deadline_ms:
                    raise
            await asyncio.sleep(0.02)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(5.0):
            return await asyncio.open_unix_connection(str(self._socket_path), limit=protocol.FRAME_BYTES)

    def _last_line(self) -> str:
        try:
            lines = self._log_path.read_bytes()[-4_096:].decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:300] if lines else ""

    def _start(self) -> subprocess.Popen[bytes]:
        self._socket_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._log_path.exists():
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        with self._log_path.open("wb") as output:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                env=child_env(),
                cwd="/",
                start_new_session=True,
            )
