"""A double of the head on a loop and a thread of its own, for callers that block: the client and the command."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.doubles.api_double import TOKEN, ApiDouble


@contextmanager
def serving(double: ApiDouble) -> Iterator[str]:
    """Serves the double; its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(double.start(), loop).result(10)
    try:
        yield double.url
    finally:
        asyncio.run_coroutine_threadsafe(double.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def commanded(double: ApiDouble, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """Serves the double as the head that the `herder` command asks: the environment names it and nothing else."""
    with serving(double) as url:
        for name in [name for name in os.environ if name.startswith("HERDER_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HERDER_URL", url)
        monkeypatch.setenv("HERDER_TOKEN", TOKEN)
        monkeypatch.setenv("HERDER_CONFIG", str(folder / "none.yaml"))
        monkeypatch.setenv("HERDER_STATE_DIR", str(folder / "none"))
        monkeypatch.setenv("COLUMNS", "80")
        yield
