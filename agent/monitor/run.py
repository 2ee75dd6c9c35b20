"""The monitor of a benchmark: an order in a folder, its files in the same folder, and word of how it goes.

The agent writes DIR/order.json and starts `python -m agent.monitor --run DIR`; the two talk through the folder only,
so a new agent finds the run of an old one. The order:

    {"interval": 1.0, "engines": [{"replica": "r1", "url": "http://127.0.0.1:8000", "api_key": ""}], "stop_after_s": 0}

Files: monitor.csv, processes.csv, engine.csv, and status.json, which is replaced as a whole every second or two:

    {"state": "running" | "ended" | "failed", "error": {"code": ..., "message": ...}, "samples": 1, "rows_lost": 0, ...}

"ended" stands there only once the files are complete. A monitor that is started again in a folder goes on with
its files.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.monitor.engines import Target
from agent.monitor.monitor import Monitor, Settings
from agent.monitor.node import NodeSample
from common.clock import boottime_ms
from common.errors import ErrorInfo, HerderError, InvalidConfig, RunFailed
from herder.decoding import UNREADABLE

log = logging.getLogger(__name__)
ORDER, STATUS = "order.json", "status.json"
NODE_FILE, PROCESS_FILE, ENGINE_FILE = "monitor.csv", "processes.csv", "engine.csv"
STATUS_EVERY_S = 2.0


class Engine(msgspec.Struct, frozen=True):
    """An engine of the order."""

    url: str
    replica: str = ""
    api_key: str = ""


class Order(msgspec.Struct, frozen=True):
    """What the agent asks for. `stop_after_s` 0: until SIGTERM."""

    interval: float = 1.0
    engines: tuple[Engine, ...] = ()
    stop_after_s: float = 0.0


class StatusFile:
    """DIR/status.json; takes part as a sink, so that the writer's thread writes it."""

    def __init__(self, path: Path) -> None:
        self.name, self.lost = str(path), 0
        self.monitor: Monitor | None = None
        self._path = path
        self._written_s = 0.0
        self._started_ms = boottime_ms()

    def write(self, samples: Sequence[NodeSample]) -> None:
        """Says how it goes, not more often than needed. Raises: OSError."""
        if time.monotonic() - self._written_s >= STATUS_EVERY_S:
            self.put("running")

    def close(self) -> None:
        """Nothing: the end is told by whoever knows how it ended."""

    def put(self, state: str, error: ErrorInfo | None = None) -> None:
        """Replaces the file. Raises: OSError."""
        status: dict[str, Any] = {
            "state": state,
            "pid": os.getpid(),
            "started_boottime_ms": self._started_ms,
            "updated_boottime_ms": boottime_ms(),
        }
        if self.monitor is not None:
            status |= self.monitor.status()
        if error is not None:
            status["error"] = error
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_bytes(msgspec.json.encode(status))
        part.replace(self._path)
        self._written_s = time.monotonic()


def read_order(folder: Path) -> Order:
    """The order of a folder. Raises: InvalidConfig."""
    try:
        return msgspec.json.decode((folder / ORDER).read_bytes(), type=Order)
    except OSError as error:
        raise InvalidConfig(f"{folder / ORDER}: {error.strerror}") from None
    except UNREADABLE as error:
        raise InvalidConfig(f"{folder / ORDER}: {error}") from None


def make(folder: Path, status: StatusFile) -> Monitor:
    """The monitor of this folder's order. Raises: InvalidConfig, ValueError."""
    order = read_order(folder)
    settings = Settings(
        interval_s=order.interval,
        outputs=(str(folder / NODE_FILE),),
        process_output=str(folder / PROCESS_FILE),
        engine_output=str(folder / ENGINE_FILE),
        is_resumed=True,
        engines=tuple(Target(engine.url, engine.replica, engine.api_key) for engine in order.engines),
        stop_after_s=order.stop_after_s,
    )
    monitor = status.monitor = Monitor(settings, sinks=(status,))
    return monitor


def perform(monitor: Monitor, status: StatusFile) -> int:
    """Runs it to its end and says how it ended. Returns the exit status."""
    try:
        monitor.run()
    except HerderError as problem:
        return refuse(status, problem)
    except (OSError, ValueError) as problem:
        return refuse(status, InvalidConfig(str(problem)))
    except Exception as problem:
        log.exception("the monitor failed")
        return refuse(status, RunFailed(f"a bug in the monitor: {problem!r}"))
    _put(status, "ended")
    return 0


def refuse(status: StatusFile, error: HerderError) -> int:
    """The run cannot be, or cannot go on. Returns the exit status."""
    log.error("the monitor cannot run: %s", error.message)
    _put(status, "failed", error.info())
    return 1


def _put(status: StatusFile, state: str, error: ErrorInfo | None = None) -> None:
    try:
        status.put(state, error)
    except OSError as problem:
        log.error("%s cannot be written: %s", status.name, problem.strerror)
