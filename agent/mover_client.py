"""Starts the mover, keeps it running, and carries requests and answers between it and the core.

The mover is a child of this process: it ends when our end of the socketpair closes. When it dies it is started
again with growing delays; the core asks again for everything that was open. Requests of the shell itself (capacity,
scan) have tokens of their own and never reach the core.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.core import events as ev
from agent.frames import BrokenFrame, read_frame
from agent.mover import protocol
from agent.mover.config import MoverConfig
from common import limits
from common.backoff import full_jitter_ms
from common.clock import boottime_ms
from common.errors import ErrorInfo, HerderError, Unavailable, from_info
from common.telemetry import fields
from herder.decoding import UNREADABLE

log = logging.getLogger(__name__)
READY_TIMEOUT_S = 300.0  # a large store is recovered first
ASK_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
STABLE_MS = 60_000
ROOT = Path(__file__).resolve().parent.parent


def child_env() -> dict[str, str]:
    """Environment of our own children: they import the same packages as we do, from nowhere else."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PYTHONSAFEPATH"] = "1"
    if not ROOT.name.endswith("-packages"):
        env["PYTHONPATH"] = str(ROOT)
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        env.pop(name, None)
    return env


class MoverClient:
    """One mover at a time. `post` hands events to the driver."""

    def __init__(
        self,
        config: MoverConfig,
        state_dir: Path,
        post: Callable[[ev.Event], None],
        *,
        rng: random.Random | None = None,
        command: tuple[str, ...] = (sys.executable, "-P", "-m", "agent.mover"),
    ) -> None:
        self.data_port = 0
        self.pid = 0
        self.starts = 0
        self.last_error = ""
        self.is_ready = asyncio.Event()
        self.is_settled = asyncio.Event()  # the first start has come to an end, good or bad
        self._config = config
        # The head and fetching nodes know the port of the first mover: the ones after it listen there again.
        self._port = config.data_port
        self._config_path = state_dir / "mover.json"
        self._post = post
        self._rng = rng or random.Random()
        self._command = command
        self._writer: asyncio.StreamWriter | None = None
        self._configure: protocol.Request | None = None
        self._waiting: dict[str, asyncio.Future[protocol.Done]] = {}
        self._count = 0
        self._came_up = False
        self._said = b""  # the last of what the present mover wrote to stderr
        self._stopping = asyncio.Event()
        self._has_ended = asyncio.Event()

    def send(self, request: protocol.Request) -> None:
        """Sends a request; dropped when no mover runs (the core asks again)."""
        if isinstance(request, protocol.Configure):
            self._configure = request
        if self.is_ready.is_set():
            self._write(request)

    def _write(self, request: protocol.Request) -> None:
        if self._writer is not None:
            self._writer.write(protocol.frame(request))

    async def ask(self, make: Callable[[str], protocol.Request], timeout_s: float = ASK_TIMEOUT_S) -> protocol.Done:
        """Asks for the shell itself. `make` gets the token. Raises: HerderError."""
        if self._writer is None:
            raise Unavailable("the mover does not run")
        self._count += 1
        token = f"shell-{self._count}"
        future: asyncio.Future[protocol.Done] = asyncio.get_running_loop().create_future()
        self._waiting[token] = future
        try:
            self._write(make(token))
            async with asyncio.timeout(timeout_s):
                done = await future
        except TimeoutError:
            raise Unavailable(f"the mover did not answer within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(token, None)
        if done.error is not None:
            raise from_info(done.error)
        return done

    async def run(self) -> None:
        """Keeps a mover running until cancelled or stopped."""
        attempt = 0
        while not self._stopping.is_set():
            started_ms = boottime_ms()
            self._came_up, self._said = False, b""
            try:
                await self._run_once()
            except (OSError, BrokenFrame, HerderError, TimeoutError) as error:
                self.last_error = str(error)[:300] or type(error).__name__
            if self._stopping.is_set():
                return
            attempt = 1 if boottime_ms() - started_ms > STABLE_MS else attempt + 1
            log.error("the mover ended", extra=fields(error=self.last_error, attempt=attempt))
            if not self._came_up:
                self._post(ev.MoverFailed(self._failure()))
                self.is_settled.set()
            delay_ms = full_jitter_ms(
                attempt, base_ms=limits.CHILD_BACKOFF_BASE_MS, cap_ms=limits.CHILD_BACKOFF_CAP_MS, rng=self._rng
            )
            await asyncio.sleep(delay_ms / 1000)

    def _failure(self) -> ErrorInfo:
        """Why it did not come up, in its own words where it had any."""
        lines = self._said.decode(errors="replace").strip().splitlines()
        said = lines[-1] if lines else ""
        try:
            own = msgspec.json.decode(said, type=ErrorInfo)
            words, hint = f"{own.code}: {own.message}", own.hint
        except UNREADABLE:
            words, hint = said or self.last_error, "its lines stand in the agent's log"
        return Unavailable(f"this node's mover does not start: {words}"[:500], hint=hint[:300]).info()

    async def _relay(self, stream: asyncio.StreamReader) -> None:
        """Passes on what the mover writes to stderr, and keeps the last of it."""
        while piece := await stream.read(65_536):
            self._said = (self._said + piece)[-4_096:]
            try:
                sys.stderr.buffer.write(piece)
                sys.stderr.buffer.flush()
            except (OSError, ValueError, AttributeError):
                pass  # nobody reads our own; the mover's must still be emptied

    async def _run_once(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            config = msgspec.structs.replace(self._config, data_port=self._port)
            self._config_path.write_bytes(msgspec.json.encode(config))
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    *("--fd", str(theirs.fileno()), "--config", str(self._config_path)),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    env=child_env(),
                )
            reader, writer = await asyncio.open_connection(sock=ours, limit=protocol.FRAME_BYTES)
        except BaseException:
            ours.close()
            raise
        self.starts += 1
        self.pid = process.pid
        self._has_ended.clear()
        self._writer = writer
        assert process.stderr is not None
        relay = asyncio.create_task(self._relay(process.stderr), name="mover-stderr")
        was_ready = False
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                ready = await read_frame(reader, protocol.answers)
            if not isinstance(ready, protocol.Ready):
                code = await _end(process)
                self._port = self._config.data_port  # somebody else may have taken the port meanwhile
                self.last_error = f"it ended with {code} before it was ready; see its lines in the log"
                return
            self.data_port = self._port = ready.port
            was_ready = True
            await self._serve(reader)
            self.last_error = "its socket was closed"
        finally:
            self._writer = None
            self.is_ready.clear()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Unavailable("the mover ended"))
            if was_ready and not self._stopping.is_set():
                self._post(ev.MoverDied(self.last_error))
            writer.close()
            await asyncio.shield(_end(process))
            await asyncio.wait((relay,), timeout=1.0)
            relay.cancel()
            self.pid = 0
            self._has_ended.set()

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        if self._configure is not None:
            self._write(self._configure)
        self._count += 1
        scan = f"scan-{self._count}"
        self._write(protocol.Scan(scan))
        while (answer := await read_frame(reader, protocol.answers)) is not None:
            match answer:
                case protocol.Done() if answer.token == scan:
                    if answer.error is not None:
                        raise from_info(answer.error)
                    self._post(ev.MoverReady(answer.copies))
                    self._came_up = True
                    self.is_ready.set()
                    self.is_settled.set()
                case protocol.Done() if answer.token in self._waiting:
                    future = self._waiting[answer.token]
                    if not future.done():
                        future.set_result(answer)
                case protocol.Done():
                    self._post(ev.MoverDone(answer))
                case protocol.Moving():
                    self._post(ev.MoverMoved(answer))
                case _:
                    pass

    async def stop(self) -> None:
        """Tells the mover to end and waits until it has; `run` then returns."""
        self._stopping.set()
        self._write(protocol.Stop("stop"))
        if self.pid:
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S + 5.0):
                    await self._has_ended.wait()
            except TimeoutError:
                log.error("the mover did not end", extra=fields(pid=self.pid))


async def _end(process: asyncio.subprocess.Process) -> int:
    """Waits for a mover that was told to end (its socket is closed); kills it when it does not."""
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()
