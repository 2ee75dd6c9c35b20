"""The head's side of the planner's process: started with the first question, ended when nobody asks.

One question at a time; a few wait, more are refused. A question that takes too long costs its process, not the head.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from common.errors import BY_CODE, HerderError, Internal, TimedOut, TooMany, Unavailable
from head.planner.endpoints.questions import Desk
from head.planner.worker import FRAME_BYTES, LENGTH, Answered, Asked

WAITING = 32  # questions that wait for their turn
ANSWER_S = 30.0
_NOT_FOR_CHILDREN = ("PYTHONPATH", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
IDLE_S = 120.0  # then the process ends: it takes some 40 MB


class PlannerProcess:
    """Ask with `ask`; `close` at the end. calibration: the cluster's own, which each process reads as it starts."""

    def __init__(self, *, calibration: Path | None = None, answer_s: float = ANSWER_S, idle_s: float = IDLE_S) -> None:
        self._calibration, self._answer_s, self._idle_s = calibration, answer_s, idle_s
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._process: asyncio.subprocess.Process | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._answers = msgspec.json.Decoder(Answered)
        self._is_closed = False

    async def ask(self, path: str, body: bytes, desk: Desk) -> bytes:
        """The answer as JSON. Raises: what the planner refuses with; TooMany, TimedOut, Unavailable."""
        if self._waiting >= WAITING:
            raise TooMany(f"{WAITING} plans are being made already", hint="try again in some seconds")
        self._waiting += 1
        try:
            async with self._turn:
                return await self._ask(Asked(path, msgspec.Raw(body or b"{}"), desk))
        finally:
            self._waiting -= 1

    async def _ask(self, asked: Asked) -> bytes:
        if self._is_closed:
            raise Unavailable("the head is stopping")
        if self._idle is not None:
            self._idle.cancel()
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._answer_s):
                process = await self._started()
                answered = await self._exchange(process, msgspec.json.encode(asked))
        except TimeoutError:
            await self._kill()
            raise TimedOut(
                f"the plan was not made within {time.monotonic() - began:.0f} s", hint="ask for fewer GPUs or choices"
            ) from None
        except (OSError, EOFError, asyncio.IncompleteReadError) as error:
            await self._kill()
            raise Internal(f"the planner's process ended: {type(error).__name__}") from None
        except BaseException:  # the caller went away in the middle: what comes out next would answer somebody else
            await self._kill()
            raise
        self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._end_idle)
        if answered.error is not None:
            raise _error_of(answered)
        return bytes(answered.answer)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "head.planner.worker",
                *([str(self._calibration)] if self._calibration is not None else []),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_child_env(),
                start_new_session=True,
            )
        return self._process

    async def _exchange(self, process: asyncio.subprocess.Process, frame: bytes) -> Answered:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(LENGTH.pack(len(frame)) + frame)
        await process.stdin.drain()
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        if length > FRAME_BYTES:
            raise EOFError("an answer that is too long")
        return self._answers.decode(await process.stdout.readexactly(length))

    def _end_idle(self) -> None:
        task = asyncio.get_running_loop().create_task(self._kill(), name="end the idle planner")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def close(self) -> None:
        """Ends the process; questions that still wait are refused."""
        self._is_closed = True
        if self._idle is not None:
            self._idle.cancel()
        await self._kill()


def _child_env() -> dict[str, str]:
    """The worker imports the same packages as we do, from nowhere else, and does not speak to systemd."""
    root = Path(__file__).resolve().parent.parent
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_CHILDREN}
    return kept | ({} if root.name.endswith("-packages") else {"PYTHONPATH": str(root)})


def _error_of(answered: Answered) -> HerderError:
    """The planner's error as one of this process."""
    assert answered.error is not None
    info = answered.error
    cls: Any = BY_CODE.get(info.code, Internal)
    error: HerderError = cls(info.message, hint=info.hint, **info.details)
    return error
