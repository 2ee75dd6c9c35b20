"""The agent's driver when it is told to stop while its ledger cannot be written."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from agent.core import effects as fx
from agent.core import events as ev
from agent.core.objects import Record
from agent.core.state import State, load
from agent.driver import Driver
from agent.ledger import Ledger
from common.clock import SystemClock


class FullLedger(Ledger):
    """A ledger on a disk that can be full."""

    is_full = False
    refused = 0

    def append(self, records: Sequence[Record]) -> None:
        if self.is_full:
            self.refused += 1
            raise sqlite3.OperationalError("database or disk is full")
        super().append(records)


async def test_a_stop_with_a_full_ledger_is_prompt_and_lets_nothing_out(tmp_path: Path) -> None:
    """No effect leaves whose record is not written, the stop waits for no disk, and the ledger reopens as it was."""
    ledger = FullLedger(tmp_path / "ledger.db")
    released: list[fx.Effect] = []
    driver = Driver(load(State(), ledger.load()), ledger, SystemClock(), released.append)
    running = asyncio.ensure_future(driver.run())
    driver.post(ev.AgentStarted("boot-1", "/models", 0))
    await driver.settled()
    before = ledger.load()
    ledger.is_full = True
    released.clear()
    driver.post(ev.AgentStarted("boot-2", "/models", 0))  # another boot is written down before anything else happens
    async with asyncio.timeout(20):
        while not driver.is_ledger_stuck:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.005)
    running.cancel()
    async with asyncio.timeout(20):  # the disk never has room again
        with contextlib.suppress(asyncio.CancelledError):
            await running
    driver.close()
    ledger.close()
    assert ledger.refused
    assert released == []
    reopened = Ledger(tmp_path / "ledger.db")
    try:
        assert reopened.load() == before
    finally:
        reopened.close()
