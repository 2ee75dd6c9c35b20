"""How late a control loop's 5 ms heartbeats are while others work: a uvloop process that stands for the agent."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import uvloop

PERIOD_S = 0.005
ROOT = Path(__file__).resolve().parents[1]


class Ticker:
    """A process that ticks from construction to `close`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ticker"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.lap()  # it runs

    def lap(self) -> list[float]:
        """The lateness of each tick since the last lap, in ms."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"lap\n")
        self._process.stdin.flush()
        found: list[float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


def quantile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def _tick() -> None:
    late_ms: list[float] = []
    ended = asyncio.Event()

    def asked() -> None:
        if not os.read(sys.stdin.fileno(), 4):
            ended.set()
            return
        sys.stdout.write(json.dumps([round(value, 3) for value in late_ms]) + "\n")
        sys.stdout.flush()
        late_ms.clear()

    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), asked)
    while not ended.is_set():
        due = time.monotonic() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        late_ms.append(max(0.0, time.monotonic() - due) * 1000)


if __name__ == "__main__":
    uvloop.run(_tick())
