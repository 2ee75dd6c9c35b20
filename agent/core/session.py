"""The session with the head, as the core sees it: whom it accepts, what it reports, what it says again.

The agent's view of its lease counts from the moment a lease was *sent*, so it always ends before the head's view.
"""

from __future__ import annotations

import zlib

import msgspec
from msgspec.structs import replace

from agent.core import copies, replicas, runs
from agent.core.effects import AskMover, CloseSession, NoteLease
from agent.core.events import LeaseAcked, SessionClosed, SessionOpened
from agent.core.objects import Meta
from agent.core.state import NEVER_MS, State
from agent.core.turn import Turn
from agent.mover import protocol as mover
from common import limits, wire

_encode = msgspec.json.Encoder().encode


def opened(turn: Turn, event: SessionOpened) -> None:
    """A head has welcomed this agent."""
    state, welcome = turn.state, event.welcome
    meta = state.meta
    if meta.cluster_id and welcome.cluster_id != meta.cluster_id:
        turn.emit(CloseSession(event.session_id, "wrong_cluster", "the head is of another cluster than this state"))
        return
    if welcome.head_epoch < meta.max_head_epoch:
        turn.emit(CloseSession(event.session_id, "stale_head", "an older head than one seen before"))
        return
    seen = Meta(meta.boot_id, welcome.cluster_id, welcome.head_epoch)
    if seen != meta:
        turn.put(seen, "head_accepted", cause=event.session_id)
    state.session_id = event.session_id
    state.is_confirmed = True
    state.reported_digest = -1
    state.pages_left = ()
    state.takes_pages = wire.FEATURE_REPORT_PAGES in welcome.features
    state.results_sent_ms.clear()
    _renew(turn, turn.now_ms + welcome.lease_ms)
    state.ask_count += 1
    turn.emit(
        AskMover(mover.Configure(f"configure-{state.ask_count}", event.node_id, welcome.ticket_key, welcome.cluster_id))
    )
    for replica in state.replicas:
        turn.touch("replica", replica)


def closed(turn: Turn, event: SessionClosed) -> None:
    """The session has ended; work goes on."""
    if turn.state.session_id == event.session_id:
        turn.state.session_id = ""
        turn.state.pages_left = ()
        turn.state.results_sent_ms.clear()


def lease_acked(turn: Turn, event: LeaseAcked) -> None:
    """The head has renewed the lease."""
    if not turn.state.session_id:
        return
    _renew(turn, event.sent_ms + event.lease_ms)
    if event.wants_report and not turn.state.pages_left:  # else it is on its way
        turn.state.reported_digest = -1


def _renew(turn: Turn, until_ms: int) -> None:
    state = turn.state
    if until_ms > state.lease_until_ms:
        state.lease_until_ms = until_ms
        if any(task.order.stop_after_ms for task in state.replicas.values()):
            turn.emit(NoteLease(until_ms))


def tell(turn: Turn) -> None:
    """After each event: reports what changed and says again what was not acknowledged."""
    state = turn.state
    if state.is_changed:
        state.digest = digest_of(report(state))
        state.is_changed = False
    if not state.session_id:
        return
    _say_results(turn)
    is_spaced = turn.now_ms - state.reported_ms >= limits.REPORT_SPACING_MS
    if state.pages_left:
        if is_spaced:
            _send_page(turn)
    elif state.digest != state.reported_digest and (is_spaced or state.reported_digest == -1):
        state.report_seq += 1
        state.reported_digest = state.digest
        whole = replace(report(state), seq=state.report_seq, digest=state.digest)
        state.pages_left = report_pages(whole) if state.takes_pages else (whole,)
        _send_page(turn)


def _send_page(turn: Turn) -> None:
    """One page at a time: all at once would overflow the link. What changes meanwhile is in the next report."""
    state = turn.state
    page, *rest = state.pages_left
    state.pages_left = tuple(rest)
    state.reported_ms = turn.now_ms
    turn.send(page)


def _say_results(turn: Turn) -> None:
    """Says results, so many at a time: all at once would overflow the link, and so end each session anew."""
    sent_ms, since_ms = turn.state.results_sent_ms, turn.now_ms - limits.RESULT_REPEAT_MS
    in_flight = sum(last_ms > since_ms for last_ms in sent_ms.values())
    for outcome in turn.state.outcomes.values():
        if in_flight >= limits.RESULTS_IN_FLIGHT:
            return
        if not outcome.is_acked and sent_ms.get(outcome.key, since_ms) <= since_ms:
            turn.say(outcome.result)
            in_flight += 1


def wake_ms(state: State, now_ms: int) -> int:
    """When `tell` has something to say next."""
    if not state.session_id:
        return NEVER_MS
    due = NEVER_MS
    if state.pages_left or state.digest != state.reported_digest:
        due = state.reported_ms + limits.REPORT_SPACING_MS
    for key, sent_ms in state.results_sent_ms.items():
        outcome = state.outcomes.get(key)
        if outcome is not None and not outcome.is_acked:
            due = min(due, sent_ms + limits.RESULT_REPEAT_MS)
    return due


def report(state: State) -> wire.Report:
    """Everything this agent holds, in a fixed order."""
    running = [
        wire.OpStatus(copy.op_id, copy.generation, "running")
        for copy in state.copies.values()
        if copy.op_id and copy.state in copies.WORKING
    ]
    running += [
        wire.OpStatus(replica.op_id, replica.generation, "running")
        for replica in state.replicas.values()
        if not replica.is_answered
    ]
    running += [
        wire.OpStatus(run.op_id, run.generation, "running") for run in state.runs.values() if not run.is_answered
    ]
    running += [wire.OpStatus(op_id, generation, "running") for op_id, generation in state.checks.items()]
    ended = [
        wire.OpStatus(outcome.key, outcome.result.generation, _ENDED.get(outcome.result.outcome, "failed"))
        for outcome in state.outcomes.values()
        if not outcome.is_acked
    ]
    return wire.Report(
        0,
        copies=tuple(copies.status(state, state.copies[key]) for key in sorted(state.copies)),
        replicas=tuple(replicas.status(state, state.replicas[key]) for key in sorted(state.replicas)),
        ops=tuple(sorted(running + ended, key=lambda op: (op.op_id, op.generation))),
        runs=tuple(runs.status(state.runs[key]) for key in sorted(state.runs)),
    )


def report_pages(whole: wire.Report) -> tuple[wire.Report, ...]:
    """The report in pages of at most REPORT_PAGE_BYTES and one item; errors lose their details where those would
    make it more than REPORT_PAGES.
    """
    if len(_encode(whole)) <= limits.REPORT_PAGE_BYTES:
        return (whole,)
    pages = _paged(whole)
    if len(pages) > limits.REPORT_PAGES:
        pages = _paged(replace(whole, copies=tuple(map(_brief, whole.copies))))
    return tuple(replace(page, page=index, pages=len(pages)) for index, page in enumerate(pages))


def _paged(whole: wire.Report) -> list[wire.Report]:
    pages: list[wire.Report] = []
    held: dict[str, list[msgspec.Struct]] = {}
    size = 0

    def close() -> None:
        nonlocal size
        page = wire.Report(whole.seq, digest=whole.digest)
        pages.append(replace(page, **{name: tuple(items) for name, items in held.items()}))
        held.clear()
        size = 0

    for name in ("copies", "replicas", "ops", "runs"):
        for item in getattr(whole, name):
            item_bytes = len(_encode(item)) + 1
            if size and size + item_bytes > limits.REPORT_PAGE_BYTES:
                close()
            held.setdefault(name, []).append(item)
            size += item_bytes
    close()
    return pages


def _brief(copy: wire.CopyStatus) -> wire.CopyStatus:
    if copy.error is None:
        return copy
    return replace(copy, error=replace(copy.error, message=copy.error.message[:100], hint="", details={}))


_ENDED = {"ok": "done", "failed": "failed", "cancelled": "cancelled"}


def digest_of(report: wire.Report) -> int:
    """31 bits over the report's copies, replicas and runs, without what changes all the time (bytes moved, ops);
    never 0.
    """
    still = [replace(copy, bytes_done=0, bytes_total=0) for copy in report.copies]
    return (zlib.crc32(_encode((still, report.replicas, report.runs))) & 0x7FFFFFFF) or 1
