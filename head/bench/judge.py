"""Judging, in processes of its own: one child per question, few at a time, each with its limits of time and memory.

What comes from load nodes is never decoded in the head. A child that dies, hangs or grows is the failure of its
question.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TypeVar

import msgspec

from common import limits
from common.errors import Internal, MemoryFull, TimedOut, TooMany, from_info
from common.telemetry import fields
from head.bench.questions import Answered, AnyQuestion
from herder.decoding import UNREADABLE

T = TypeVar("T")
log = logging.getLogger(__name__)
AT_ONCE = 2
WAITING = 64
ANSWER_BYTES = 67_108_864
KILLED = -signal.SIGKILL
_NOT_FOR_CHILDREN = ("PYTHONPATH", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Judges:
    """Asks children."""

    def __init__(self, *, answer_s: float = limits.JUDGE_S, memory_bytes: int = 0, at_once: int = AT_ONCE) -> None:
        """memory_bytes 0: JUDGE_BYTES, and at most half of the machine's."""
        self._answer_s = answer_s
        self._memory_bytes = memory_bytes or min(limits.JUDGE_BYTES, _machine_bytes() // 2)
        self._turns = asyncio.Semaphore(at_once)
        self.waiting = 0

    async def ask(self, question: AnyQuestion, answer: type[T], *, timeout_s: float = 0.0) -> T:
        """The answer. Raises: what the child refuses with; TooMany, TimedOut, MemoryFull, Internal."""
        if self.waiting >= WAITING:
            raise TooMany("too many reports are being made", hint="try again in some seconds")
        self.waiting += 1
        try:
            async with self._turns:
                return await self._ask(question, answer, timeout_s or self._answer_s)
        finally:
            self.waiting -= 1

    async def _ask(self, question: AnyQuestion, answer: type[T], timeout_s: float) -> T:
        process = await self._started()
        try:
            async with asyncio.timeout(timeout_s):
                said, _ = await process.communicate(msgspec.json.encode(question))
        except TimeoutError:
            raise TimedOut(f"judging took longer than {timeout_s:g} s") from None
        finally:
            await _end(process)
        if process.returncode:
            log.error("a judging child ended", extra=fields(exit_code=process.returncode))
            if process.returncode == KILLED:
                raise MemoryFull("judging was killed; the head's machine has too little memory")
            raise Internal(f"judging ended with {process.returncode}; the head's log has what it said")
        try:
            answered = msgspec.json.decode(said, type=Answered)
            if answered.error is not None:
                raise from_info(answered.error)
            return msgspec.convert(answered.value, answer)
        except UNREADABLE:
            raise Internal("judging said nothing that can be read") from None

    async def _started(self) -> asyncio.subprocess.Process:
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "head.bench.judge_child",
                str(self._memory_bytes),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_child_env(),
                start_new_session=True,
            )
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            await _end(await starting)  # half started it would be nobody's
            raise


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Nothing of the child stays, whatever became of its question."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _child_env() -> dict[str, str]:
    """The child imports the same packages as we do, from nowhere else, and does not speak to systemd."""
    root = Path(__file__).resolve().parent.parent.parent
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_CHILDREN}
    return kept | ({} if root.name.endswith("-packages") else {"PYTHONPATH": str(root)})
