"""Async tests run on an event loop of their own, and none may leave a task behind."""

from __future__ import annotations

import asyncio
import inspect
import signal
from typing import Any

import pytest


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would all that it starts: tests that send it would wait."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs `async def test_...` to its end; a task that outlives it fails the test."""
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def run() -> None:
        before = asyncio.all_tasks()
        await function(**arguments)
        await asyncio.sleep(0)  # tasks that were cancelled and awaited by nobody get their turn to end
        left = {task.get_name() for task in asyncio.all_tasks() - before if not task.done()}
        assert not left, f"tasks left behind: {sorted(left)}"

    asyncio.run(run())
    return True
