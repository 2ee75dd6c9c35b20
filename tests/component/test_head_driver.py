"""The driver with a real loop: one order for everything, and a head that lives through its disk's bad days."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from common import limits, wire
from common.clock import ManualClock
from common.errors import AlreadyExists, ErrorInfo, HerderError, StateReadOnly, TimedOut, Unavailable
from head import driver as driver_module
from head.core import events as ev
from head.core.effects import Alarm
from head.core.state import State
from head.core.turn import Turn
from head.driver import READ_ONLY_ALARM, SLOW_ALARM, Driver
from head.feed import Feed
from head.journal import Row
from head.pipeline import Step
from tests.doubles.head_shell import NOW_MS, SwitchJournal, register, small_step, until


class Outbox:
    """Remembers what left for the agents."""

    def __init__(self) -> None:
        self.sent: list[wire.Message] = []
        self.closed: list[str] = []

    def send(self, session_id: str, message: wire.Message) -> None:
        self.sent.append(message)

    def close_session(self, session_id: str, error: ErrorInfo | None) -> None:
        self.closed.append(session_id)


class Head:
    """A driver and what it stands on."""

    def __init__(self, step: Step = small_step) -> None:
        self.journal = SwitchJournal()
        self.outbox = Outbox()
        self.driver = Driver(State(), self.journal, ManualClock(NOW_MS), Feed(), step=step)


@contextlib.asynccontextmanager
async def running(step: Step = small_step, *, with_ticks: bool = False) -> AsyncIterator[Head]:
    """A head that runs until the block ends."""
    head = Head(step)
    head.driver.start(head.outbox, with_ticks=with_ticks)
    try:
        yield head
    finally:
        head.journal.gate.set()
        await head.driver.stop()


async def refusal(driver: Driver, event: ev.RequestEvent) -> HerderError:
    """How a request was refused."""
    with pytest.raises(HerderError) as error:
        await driver.submit(event)
    return error.value


async def test_an_answer_means_durable() -> None:
    """`submit` returns the reply after its records are in the journal, and the feed tells of them."""
    async with running() as head:
        following = head.driver.feed().subscribe()
        reply = await head.driver.submit(register("a"))
        assert reply.reference == "model:a"
        assert [row.key for row in head.journal.rows] == ["a"]
        event = await anext(following)
        assert (event.id, event.what, event.key, event.cause) == (1, "model_registered", "a", "req-1")
        assert [line.key for line in await head.driver.story("a")] == ["a"]


async def test_refusals_keep_their_type() -> None:
    """What the core refuses arrives as the same error."""
    async with running() as head:
        await head.driver.submit(register("a"))
        assert isinstance(await refusal(head.driver, register("a", "req-2")), AlreadyExists)


async def test_leases_pass_a_slow_commit() -> None:
    """While a batch is on its way to the disk, acks leave and requests wait; readers wait for what they would see."""
    async with running() as head:
        head.journal.gate.clear()
        slow = asyncio.ensure_future(head.driver.submit(register("a")))
        await until(lambda: head.journal.waiting == 1)
        head.driver.post(ev.LeaseRenewed("n1", "ses-1", wire.Lease(7, 5)))
        await until(lambda: len(head.outbox.sent) == 1)
        reader = asyncio.ensure_future(head.driver.durable())
        await asyncio.sleep(0)
        assert not slow.done()
        assert not reader.done()
        head.journal.gate.set()
        await reader
        assert (await slow).reference == "model:a"


async def test_many_changes_share_commits() -> None:
    """A thousand requests at once take a few commits."""
    async with running() as head:
        await asyncio.gather(*(head.driver.submit(register(f"m{n}", f"req-{n}")) for n in range(1_000)))
        assert len(head.journal.rows) == 1_000
        assert len(head.journal.batches) < 20
        assert [row.revision for row in head.journal.rows] == list(range(1, 1_001))


async def test_a_full_disk_refuses_changes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes answer 507, leases go on, the alarm is on; once there is room the head goes on by itself."""
    monkeypatch.setattr(driver_module, "PROBE_BASE_MS", 10)
    async with running() as head:
        driver = head.driver
        head.journal.fill_disk()
        assert isinstance(await refusal(driver, register("a", "req-1")), StateReadOnly)
        assert driver.is_read_only
        assert READ_ONLY_ALARM in driver.alarms
        assert driver.state.models == {}
        assert isinstance(await refusal(driver, register("b", "req-2")), StateReadOnly)
        driver.post(ev.LeaseRenewed("n1", "ses-1", wire.Lease(7, 5)))
        driver.post(ev.ResultReceived("n1", "ses-1", wire.Result("op-1", 1, "ok")))
        await until(lambda: len(head.outbox.sent) == 1)
        await driver.durable()
        assert driver.parked_events == 1
        head.journal.problem = None
        await until(lambda: not driver.is_read_only)
        await until(lambda: len(head.outbox.sent) == 2)
        assert isinstance(head.outbox.sent[1], wire.ResultAck)
        assert (await driver.submit(register("a", "req-3"))).reference == "model:a"
        assert driver.alarms == {}


async def test_a_journal_that_takes_probes_only_is_asked_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal after a probe that succeeded makes the next wait longer, until a batch is durable."""
    waits: list[int] = []

    def soon(attempt: int, *, base_ms: int, cap_ms: int) -> int:
        waits.append(attempt)
        return 1

    monkeypatch.setattr("common.backoff.ceiling_ms", soon)
    async with running() as head:
        commit = head.journal.commit

        async def probes_only(rows: Sequence[Row]) -> None:
            if rows:
                raise StateReadOnly("the journal cannot be written: disk full")
            await commit(rows)

        monkeypatch.setattr(head.journal, "commit", probes_only)
        for number in range(3):
            assert isinstance(await refusal(head.driver, register("a", f"req-{number}")), StateReadOnly)
            await until(lambda: not head.driver.is_read_only)
        assert waits == [1, 2, 3]
        monkeypatch.setattr(head.journal, "commit", commit)
        await head.driver.submit(register("a", "req-4"))
        head.journal.fill_disk()
        assert isinstance(await refusal(head.driver, register("b", "req-5")), StateReadOnly)
        await until(lambda: len(waits) > 3)
        assert waits[3] == 1


async def test_a_bug_costs_one_answer_and_not_the_daemon(caplog: pytest.LogCaptureFixture) -> None:
    """The request is answered `internal`, the log has the traceback, and the next request is served."""
    async with running() as head:
        assert (await refusal(head.driver, register("bug", "req-1"))).code == "internal"
        assert head.driver.counts["bugs"] == 1
        assert "ZeroDivisionError" in caplog.text
        assert (await head.driver.submit(register("a", "req-2"))).reference == "model:a"


async def test_a_failing_outlet_does_not_stop_the_driver() -> None:
    """An effect that cannot leave is counted; the ones after it leave."""
    async with running() as head:

        def broken(session_id: str, message: wire.Message) -> None:
            raise OSError("no way out")

        head.outbox.send = broken  # type: ignore[method-assign]
        head.driver.post(ev.LeaseRenewed("n1", "ses-1", wire.Lease(7, 5)))
        assert (await head.driver.submit(register("a"))).reference == "model:a"
        assert head.driver.counts["bugs"] == 1


async def test_a_full_queue_refuses_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit requests answer 503 at once, and whoever posts much is made to wait until there is room."""
    monkeypatch.setattr(limits, "JOURNAL_QUEUE_EVENTS", 10)
    async with running() as head:
        head.journal.gate.clear()
        first = [asyncio.ensure_future(head.driver.submit(register(f"m{n}", f"req-{n}"))) for n in range(10)]
        await asyncio.sleep(0)
        assert isinstance(await refusal(head.driver, register("more", "req-more")), Unavailable)
        head.journal.gate.set()
        await asyncio.gather(*first)
        for number in range(12):
            head.driver.post(ev.LeaseRenewed("n1", "ses-1", wire.Lease(number, 5)))
        poster = asyncio.ensure_future(head.driver.room())
        await asyncio.sleep(0)
        await poster
        assert head.driver.queue_depth < 10


async def test_a_hanging_disk_gives_an_unknown_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request waits a limited time and then says that the outcome is unknown; the change still happens."""
    monkeypatch.setattr(limits, "SUBMIT_S", 0.05)
    async with running() as head:
        head.journal.gate.clear()
        assert isinstance(await refusal(head.driver, register("a")), TimedOut)
        with pytest.raises(TimedOut):
            await head.driver.durable()
        head.journal.gate.set()
        await until(lambda: len(head.journal.rows) == 1)


async def test_ticks_come_and_name_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks are posted by themselves, one at a time, and carry how late the loop was; a slow commit raises an alarm."""
    monkeypatch.setattr(limits, "TICK_MS", 5)
    monkeypatch.setattr(driver_module, "SLOW_COMMIT_MS", 20)
    stalls: list[int] = []

    def watching(state: State, event: ev.Event, now_ms: int) -> Turn:
        if isinstance(event, ev.Ticked):
            stalls.append(event.stall_ms)
        return small_step(state, event, now_ms)

    lags: list[int] = []
    async with running(watching, with_ticks=True) as head:
        head.driver.on_lag = lags.append
        await until(lambda: len(stalls) > 3)
        __import__("time").sleep(0.2)
        await until(lambda: max(stalls) >= 100)
        assert max(lags) >= 100
        head.journal.gate.clear()
        waiting = asyncio.ensure_future(head.driver.submit(register("a")))
        await until(lambda: SLOW_ALARM in head.driver.alarms)
        head.journal.gate.set()
        await waiting
        assert SLOW_ALARM not in head.driver.alarms


async def test_alarms_of_the_core_are_kept_until_cleared() -> None:
    """An alarm is on until the core says otherwise."""
    turns = iter([Alarm("nodes_lost", "most nodes are gone"), Alarm("nodes_lost", "", is_on=False)])

    def alarming(state: State, event: ev.Event, now_ms: int) -> Turn:
        turn = Turn(state, now_ms, "x")
        turn.emit(next(turns))
        return turn

    async with running(alarming) as head:
        head.driver.post(ev.Ticked())
        await until(lambda: head.driver.alarms == {"nodes_lost": "most nodes are gone"})
        assert head.driver.alarms  # it stays on by itself
        head.driver.post(ev.Ticked())
        await until(lambda: not head.driver.alarms)
        assert next(turns, None) is None


async def test_a_stop_finishes_what_was_taken() -> None:
    """Requests in hand are answered, later ones refused."""
    head = Head()
    head.driver.start(head.outbox, with_ticks=False)
    head.journal.gate.clear()
    taken = asyncio.ensure_future(head.driver.submit(register("a")))
    await until(lambda: head.journal.waiting == 1)
    stopping = asyncio.ensure_future(head.driver.stop())
    await asyncio.sleep(0)
    assert isinstance(await refusal(head.driver, register("b", "req-2")), Unavailable)
    head.journal.gate.set()
    await stopping
    assert (await taken).reference == "model:a"
    assert len(head.driver.tasks) == 0


async def test_cancelling_a_request_at_every_await_harms_nobody() -> None:
    """A caller that goes away, whenever, leaves no request behind, and others are served."""
    async with running() as head:
        for turns in range(6):
            request = asyncio.ensure_future(head.driver.submit(register(f"c{turns}", f"req-c{turns}")))
            for _ in range(turns):
                await asyncio.sleep(0)
            request.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await request
            assert (await head.driver.submit(register(f"d{turns}", f"req-d{turns}"))).reference == f"model:d{turns}"
        assert head.driver._requests == {}
