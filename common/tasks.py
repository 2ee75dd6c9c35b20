"""Task supervision: every task has a name and an owner, and none fails unseen.

Nothing else in the tree calls `create_task`. A task that fails is logged and recorded; a critical one also resolves
`failed`, which a daemon waits on beside its signals, because a daemon that lost an organ must not play healthy.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from common.clock import boottime_ms
from common.telemetry import fields

log = logging.getLogger(__name__)
FAILURES_KEPT = 100


class Failure(msgspec.Struct, frozen=True):
    """A task that ended with an exception."""

    name: str
    error: str
    at_boottime_ms: int


class Supervisor:
    """Owns the tasks of one part of a daemon."""

    def __init__(self, name: str, on_failure: Callable[[Failure], None] | None = None) -> None:
        self.name = name
        self.failures: deque[Failure] = deque(maxlen=FAILURES_KEPT)
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failed: asyncio.Future[Failure] | None = None
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def names(self) -> list[str]:
        """Names of the tasks that run."""
        return sorted(task.get_name() for task in self._tasks)

    def start(self, name: str, work: Coroutine[Any, Any, Any], *, is_critical: bool = False) -> asyncio.Task[Any]:
        """Runs the coroutine as a task of this supervisor. After `close` it is refused (RuntimeError)."""
        if self._is_closed:
            work.close()
            raise RuntimeError(f"supervisor {self.name} is closed; {name} was not started")
        task = asyncio.get_running_loop().create_task(work, name=f"{self.name}/{name}")
        self._tasks.add(task)
        task.add_done_callback(self._on_critical_done if is_critical else self._on_done)
        return task

    async def failed(self) -> Failure:
        """Waits until a critical task has failed or ended by itself."""
        if self._failed is None:
            self._failed = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._failed)

    async def close(self, timeout_s: float = 5.0) -> list[str]:
        """Cancels what runs and waits for it; returns the names of tasks that did not end in time."""
        self._is_closed = True
        mine = asyncio.current_task()
        waiting = {task for task in self._tasks if task is not mine}
        for task in waiting:
            task.cancel()
        if waiting:
            _, waiting = await asyncio.wait(waiting, timeout=timeout_s)
        stuck = sorted(task.get_name() for task in waiting)
        if stuck:
            log.error("tasks did not end", extra=fields(tasks=",".join(stuck)))
        return stuck

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._record(task, error)

    def _on_critical_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if self._is_closed and task.cancelled():
            return
        error: BaseException | None = None if task.cancelled() else task.exception()
        if error is None and self._is_closed:
            return
        failure = self._record(task, error or RuntimeError("ended by itself"))
        if self._failed is None:
            self._failed = task.get_loop().create_future()
        if not self._failed.done():
            self._failed.set_result(failure)

    def _record(self, task: asyncio.Task[Any], error: BaseException) -> Failure:
        failure = Failure(task.get_name(), f"{type(error).__name__}: {error}", boottime_ms())
        self.failures.append(failure)
        log.error("task failed", extra=fields(task=failure.name), exc_info=error)
        if self._on_failure is not None:
            self._on_failure(failure)
        return failure
