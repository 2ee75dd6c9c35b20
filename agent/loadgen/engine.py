"""One process's share of a run: one epoll loop that sends on the schedule, reads what comes, and keeps rows.

Open loop: every arrival is sent at its time, whatever came back before. Closed loop: a number of slots each send their
next request when the last one was answered (and a think time has passed); the intended time is then the moment the slot
was free. Turns of a conversation follow the answer of the turn before in both.
"""

from __future__ import annotations

import heapq
import select
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agent.loadgen.apis import Api
from agent.loadgen.clocks import Stamps, Timer
from agent.loadgen.connection import _OWN_LIMITS, Call, Connection, Endpoint
from agent.loadgen.judge import Untold, row_of
from agent.loadgen.postgres import PgConnection
from agent.loadgen.spread import Choose, only
from agent.loadgen.workload import Item
from common.bench.histogram import Histogram, bucket_of
from common.bench.records import Records

NS = 1_000_000_000
BATCH = 64  # reads between two looks at the schedule: 64 x 10 us is the most that reading delays a send
SWEEP_NS = 100_000_000
TICK_NS = NS
FAILED_SLOT_NS = 100_000_000  # a closed slot whose request failed rests, so that a dead server is not hammered
MAX_TICK_SAMPLES = 500
_FAR_NS = 1 << 62
_IN = select.EPOLLIN
_monotonic_ns = time.monotonic_ns


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds; how many may be on their way."""

    connect_s: float = 10.0
    first_s: float = 300.0
    """From sending to the first output."""
    idle_s: float = 120.0
    """Between two reads of an answer."""
    total_s: float = 900.0
    drain_s: float = 60.0
    """After the last send."""
    in_flight: int = 20_000


@dataclass(frozen=True, slots=True)
class Share:
    """What one process is to do. Times are nanoseconds after the common start."""

    api: Api
    endpoints: Sequence[Endpoint]
    items: Sequence[Item]
    """Written for the first endpoint; for others their first lines are changed as they are sent."""
    choose: Choose = only
    """The endpoint of a conversation."""
    indices: range = field(default_factory=lambda: range(0))
    times_ns: array[int] = field(default_factory=lambda: array("q"))
    slots: int = 0
    """Closed loop: how many requests are kept on their way."""
    slots_before: int = 0
    """Closed loop: slots of the processes before this one, so that each starts elsewhere in the items."""
    slots_in_all: int = 0
    requests: int | None = None
    """Closed loop: how many this process sends."""
    until_ns: int | None = None
    """Nothing is sent from here on."""
    think_s: float = 0.0
    turn_think_s: float = 0.0
    stagger_s: float = 0.0
    """Closed loop: the slots begin spread over this time."""
    window_ns: tuple[int, int | None] = (0, None)
    connections: int = 0
    """Opened before the start."""
    limits: Limits = field(default_factory=Limits)
    keeps_text: bool = False
    most_rows: int = 1 << 62
    """Sending ends when so many requests have ended."""
    counter: Callable[[str], int] | None = None
    """Counts, after the run, the tokens of answers that the server told none of. Raises: ValueError."""


@dataclass(slots=True)
class Tick:
    """What happened in the last second."""

    at_s: float = 0.0
    sent: int = 0
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens: int = 0
    ttft_ns: list[int] = field(default_factory=list)
    measured: int = 0
    """Those of `done` that were due in the measured window."""
    measured_failed: int = 0
    e2e: dict[int, int] = field(default_factory=dict)
    """Their good answers' latencies: counts by bucket of a Histogram."""
    e2e_sum_ns: int = 0


class Engine:
    """Runs a share. `open_connections` first, `run` when the start is known; `stop` and `cancel` from its own loop."""

    def __init__(
        self,
        share: Share,
        *,
        count_tokens: Callable[[str], int] | None = None,
        control_fd: int | None = None,
        on_control: Callable[[Engine], None] | None = None,
        on_tick: Callable[[Tick], None] | None = None,
    ) -> None:
        self.share = share
        self.api = share.api
        self.epoll = select.epoll()
        self.stamps = Stamps()
        self.timer = Timer()
        self.records = Records()
        self.gaps = Histogram()
        """Gaps that are both between pieces and between tokens: counted once here, added to both at the end."""
        self.lags: list[int] = []
        """Of the reads since the last sweep."""
        self.untold = Untold()
        self.reads = self.coalesced = 0
        """Reads without a stamp as they come, those with one at the next sweep."""
        self.start_ns = 0
        self.is_stopping = False
        self.stopped_ns: int | None = None
        self.filled_ns: int | None = None
        """When it stopped for the most rows."""
        self.live: dict[Call, Connection] = {}
        self._count_tokens, self._on_control, self._on_tick = count_tokens, on_control, on_tick
        self._control_fd = control_fd
        self._by_fd: dict[int, Connection] = {}
        self._idle: list[list[Connection]] = [[] for _ in share.endpoints]
        first = share.endpoints[0].opening
        self._openings = [there.opening if there.opening != first else b"" for there in share.endpoints]
        self._cut = len(first)
        self._waiting: dict[Connection, Call] = {}
        # (when, order, item, index, turn, slot, endpoint)
        self._due: list[tuple[int, int, Item, int, int, int, int]] = []
        self._next = 0  # of the schedule
        self._order = 0
        self._taken = 0  # closed loop: conversations begun or put on the schedule
        self._armed_ns = -1
        self._next_ns = _FAR_NS  # the next intended send, so that most turns of the loop need no look at the schedule
        self._is_held = False
        self._last_send_ns = 0
        self._ticked = Tick()
        self.epoll.register(self.timer.fd, select.EPOLLIN)
        if control_fd is not None:
            self.epoll.register(control_fd, select.EPOLLIN)

    # before and after the run
    def open_connections(self) -> None:
        """Opens the connections that are wanted before the start; what cannot be opened shows in the run."""
        share = self.share
        for number in range(share.connections):
            index = share.indices[number] if number < len(share.indices) else share.slots_before + number
            try:
                self._connect(share.choose(index, number))
            except OSError:
                break
        deadline = _monotonic_ns() + int(share.limits.connect_s * NS)
        while any(not c.is_open for c in self._by_fd.values()) and _monotonic_ns() < deadline and not self.is_stopping:
            self._turn(0.05)

    def close(self) -> None:
        """Closes every socket."""
        for connection in list(self._by_fd.values()):
            connection.close()
        self.timer.close()
        self.epoll.close()

    def stop(self) -> None:
        """Sends nothing more; answers on their way are awaited for the drain time."""
        if not self.is_stopping:
            self.is_stopping = True
            self._next_ns = _FAR_NS
            self.stopped_ns = self._last_send_ns = _monotonic_ns()

    def cancel(self, outcome: str = "cancelled", said: str = "") -> None:
        """Ends everything on its way."""
        self.stop()
        self._due.clear()
        now = _monotonic_ns()
        for call, connection in list(self.live.items()):
            connection.close()
            self._forget(connection)
            self._end(call, outcome, 0, said, now)

    # the loop
    def run(self, start_ns: int) -> Records:
        """Sends and reads until the share is done. start_ns: the common start, on CLOCK_MONOTONIC."""
        self.start_ns = self._last_send_ns = start_ns
        self._begin_slots()
        self._look_ahead()
        next_sweep, next_tick = start_ns, start_ns + TICK_NS
        next_look = next_sweep
        while self.live or not self._is_over():
            if self._next_ns != self._armed_ns and self._next_ns != _FAR_NS:
                self.timer.arm(self._next_ns)
                self._armed_ns = self._next_ns
            self._turn(0.1)
            now = _monotonic_ns()
            if now >= self._next_ns:
                self._send_due(now)
            if now < next_look:
                continue
            if now >= next_sweep:
                self._sweep(now)
                next_sweep = now + SWEEP_NS
            if now >= next_tick:
                self._tick(now)
                next_tick += TICK_NS * max(1, (now - next_tick) // TICK_NS + 1)
            next_look = min(next_sweep, next_tick)
        self._sweep(_monotonic_ns())
        self._tick(_monotonic_ns())
        facts = self.records
        facts.icl.merge(self.gaps)
        facts.itl.merge(self.gaps)
        facts.count("reads", self.reads)
        facts.count("coalesced", self.coalesced)
        facts.count("clock_steps", self.stamps.steps)
        facts.count("not_sent", max(0, len(self.share.times_ns) - self._next))
        return self.records

    def wait(self, timeout_s: float) -> None:
        """One look at what has come, before the start."""
        self._turn(timeout_s)

    def _turn(self, timeout_s: float) -> None:
        by_fd = self._by_fd
        for fd, mask in self.epoll.poll(timeout_s, BATCH):
            connection = by_fd.get(fd)
            if connection is not None:
                if mask == _IN and connection.is_open:
                    connection.read()
                else:
                    connection.on_event(mask)
            elif fd == self.timer.fd:
                self.timer.clear()
                self._armed_ns = -1
            elif fd == self._control_fd and self._on_control is not None:
                self._on_control(self)

    def _is_over(self) -> bool:
        if self.live or self._waiting:
            return False
        return self.is_stopping or self._next_due() is None

    def _next_due(self) -> int | None:
        """The next intended send time, on CLOCK_MONOTONIC."""
        best: int | None = None
        if self._next < len(self.share.times_ns):
            best = self.start_ns + self.share.times_ns[self._next]
        if self._due and (best is None or self._due[0][0] < best):
            best = self._due[0][0]
        return best

    def _look_ahead(self) -> None:
        """Sets when the loop must look at the schedule again."""
        due = self._next_due()
        self._next_ns = _FAR_NS if due is None or self.is_stopping else due

    # sending
    def _begin_slots(self) -> None:
        share = self.share
        for slot in range(share.slots):
            spread = share.stagger_s * (share.slots_before + slot) / max(1, share.slots_in_all)
            self._next_of_slot(slot, self.start_ns + int(spread * NS))

    def _next_of_slot(self, slot: int, when_ns: int) -> None:
        """A closed slot takes the next conversation."""
        share = self.share
        if share.requests is not None and self._taken >= share.requests:
            return
        if share.until_ns is not None and when_ns >= self.start_ns + share.until_ns:
            return
        # Processes take turns in the items, as slots would in one process.
        index = share.slots_before + (self._taken // max(1, share.slots)) * share.slots_in_all
        index += self._taken % max(1, share.slots)
        endpoint = share.choose(index, self._taken)
        self._taken += 1
        self._add_due(when_ns, share.items[index % len(share.items)], index, 0, slot, endpoint)

    def _add_due(self, when_ns: int, item: Item, index: int, turn: int, slot: int, endpoint: int) -> None:
        self._order += 1
        heapq.heappush(self._due, (when_ns, self._order, item, index, turn, slot, endpoint))
        if when_ns < self._next_ns and not self._is_held:
            self._next_ns = when_ns

    def _send_due(self, now: int) -> None:
        if self.is_stopping:
            return
        share, times, items = self.share, self.share.times_ns, self.share.items
        while self._next < len(times) and self.start_ns + times[self._next] <= now:
            if len(self.live) >= share.limits.in_flight:
                # The end of any request looks again; the timer would find nothing to do.
                self.records.count("held_back")
                self._is_held, self._next_ns = True, _FAR_NS
                return
            index = share.indices[self._next]
            scheduled = self.start_ns + times[self._next]
            endpoint = share.choose(index, self._next)
            self._next += 1
            self._dispatch(Call(index, items[index % len(items)], 0, scheduled, -1, share.keeps_text, endpoint))
        while self._due and self._due[0][0] <= now:
            when, _, item, index, turn, slot, endpoint = heapq.heappop(self._due)
            self._dispatch(Call(index, item, turn, when, slot, share.keeps_text, endpoint))
        self._look_ahead()

    def _dispatch(self, call: Call) -> None:
        now = _monotonic_ns()
        if call.acted < 0:
            call.acted = now
            self._ticked.sent += 1
            self._last_send_ns = now
        idle = self._idle[call.endpoint]
        while idle and not call.is_retried:
            connection = idle.pop()
            if connection.is_open and connection.call is None:
                call.is_reused = True
                self.live[call] = connection
                self._send(connection, call)
                return
        try:
            connection = self._connect(call.endpoint)
        except OSError as error:
            outcome = "no_socket" if error.errno in _OWN_LIMITS else "connect"
            self._end(call, outcome, 0, error.strerror or str(error), now)
            return
        self._waiting[connection] = call
        self.live[call] = connection

    def _send(self, connection: Connection, call: Call) -> None:
        wire, opening = call.item.wire, self._openings[call.endpoint]
        connection.send(call, b"".join((opening, memoryview(wire)[self._cut :])) if opening else wire)

    def _connect(self, endpoint: int) -> Connection:
        there = self.share.endpoints[endpoint]
        connection = (PgConnection if there.login is not None else Connection)(self, there, endpoint)
        self._by_fd[connection.fd] = connection
        self.records.count("connections")
        return connection

    # what connections tell
    def opened(self, connection: Connection) -> None:
        """A connection can be used."""
        call = self._waiting.pop(connection, None)
        if call is None:
            self._idle[connection.endpoint].append(connection)
            return
        call.connect = connection.took
        self._send(connection, call)

    def answered(self, connection: Connection, call: Call, at_ns: int) -> None:
        """An answer is over."""
        if connection.is_open:
            self._idle[connection.endpoint].append(connection)
        else:
            self._forget(connection)
        self._end(call, None, connection.reader.status, "", at_ns)

    def failed(self, connection: Connection, call: Call | None, outcome: str, said: str, at_ns: int) -> None:
        """A connection is closed."""
        self._forget(connection)
        call = call or self._waiting.pop(connection, None)
        if call is None:
            return
        if outcome == "reset" and call.is_reused and not call.bytes and not call.is_retried:
            # The server closed a kept connection just as it was used: the request goes out once more on a new one.
            self.records.count("stale_connections")
            self.live.pop(call, None)
            call.restart(self.share.keeps_text)
            call.is_retried = True
            self._dispatch(call)
            return
        self._end(call, outcome, connection.reader.status, said, at_ns)

    def _forget(self, connection: Connection) -> None:
        if self._by_fd.get(connection.fd) is connection:
            del self._by_fd[connection.fd]
        idle = self._idle[connection.endpoint]
        if not connection.is_open and connection in idle:
            idle.remove(connection)

    def _end(self, call: Call, outcome: str | None, status: int, said: str, at_ns: int) -> None:
        """A request is over: its row is kept, and what follows it is put on the schedule."""
        connection = self.live.pop(call, None)
        if connection is not None and self._waiting.get(connection) is call:
            del self._waiting[connection]
        is_good = row_of(self, call, outcome, status, said, at_ns)
        tick = self._ticked
        tick.done += 1
        if not is_good:
            tick.failed += 1
        if call.stamps:
            tick.tokens += len(call.stamps)
            if len(tick.ttft_ns) < MAX_TICK_SAMPLES:
                tick.ttft_ns.append(call.stamps[0] - call.sent)
        if self._on_tick is not None:
            self._measure(tick, call, is_good, at_ns)
        if self.is_stopping:
            return
        if self._is_held:
            self._is_held, self._next_ns = False, 0
        now = _monotonic_ns()
        follow = call.item.follow
        if call.item.talk is not None and is_good:
            follow = call.item.talk.answered(call.answer, len(call.stamps))
        if follow is not None and is_good:
            when = max(at_ns, 0) + int(self.share.turn_think_s * NS)
            self._add_due(when, follow, call.index, call.turn + 1, call.slot, call.endpoint)
        elif call.slot >= 0:
            think = int(self.share.think_s * NS) if is_good else max(int(self.share.think_s * NS), FAILED_SLOT_NS)
            self._next_of_slot(call.slot, (at_ns if is_good else now) + think)

    def _measure(self, tick: Tick, call: Call, is_good: bool, at_ns: int) -> None:
        """Adds a request of the window to what is told live: the sums of all ticks are the report's."""
        begin, end = self.share.window_ns
        due = call.scheduled - self.start_ns
        if due < begin or (end is not None and due >= end):
            return
        tick.measured += 1
        tick.measured_failed += not is_good
        if is_good and call.sent >= 0:
            took = (call.stamps[-1] if call.stamps else at_ns) - call.sent
            bucket = bucket_of(took)
            tick.e2e[bucket] = tick.e2e.get(bucket, 0) + 1
            tick.e2e_sum_ns += took

    # once in a while
    def _sweep(self, now: int) -> None:
        """Ends what takes too long; keeps the clocks together."""
        self.stamps.refresh()
        self.records.lag.add_all(self.lags)
        self.reads += len(self.lags)
        self.lags.clear()
        limits = self.share.limits
        if len(self.records) >= self.share.most_rows and not self.is_stopping:
            self.records.count("too_many")
            self.filled_ns = now
            self.stop()
        if self.share.until_ns is not None and not self.is_stopping and now >= self.start_ns + self.share.until_ns:
            self._due = [entry for entry in self._due if entry[4] > 0]  # turns of conversations go on
            heapq.heapify(self._due)
        for call, connection in list(self.live.items()):
            outcome = _overdue(call, connection, limits, now)
            if outcome:
                connection.close()
                self._forget(connection)
                self._end(call, outcome, 0, "", now)
        is_last = self.is_stopping or self._next_due() is None
        if is_last and self.live and now - self._last_send_ns > limits.drain_s * NS:
            self.records.count("drain_timeouts", len(self.live))
            self.cancel(said=f"not over {limits.drain_s:g} s after the last was sent")

    def _tick(self, now: int) -> None:
        if self._on_tick is not None:
            self._ticked.at_s = (now - self.start_ns) / NS
            self._ticked.in_flight = len(self.live)
            self._on_tick(self._ticked)
        self._ticked = Tick()

    def tokens_of(self, texts: Sequence[str]) -> list[int] | None:
        """Tokens of each piece by the tokenizer, where there is one."""
        return [self._count_tokens(text) for text in texts] if self._count_tokens is not None else None


def _overdue(call: Call, connection: Connection, limits: Limits, now: int) -> str:
    """Which limit a call has passed; "" for none."""
    if now - call.acted > limits.total_s * NS:
        return "timeout_total"
    if not connection.is_open:
        return "timeout_connect" if now - call.acted > limits.connect_s * NS else ""
    if not call.stamps and now - call.sent > limits.first_s * NS:
        return "timeout_ttft"
    if call.heard and now - call.heard > limits.idle_s * NS:
        return "timeout_idle"
    return ""
