"""Agents that lie, over real sockets: what no honest agent says ends the session and reaches nobody else."""

from __future__ import annotations

import json

import msgspec
import pytest

from common import limits, wire
from common.errors import ErrorInfo, InvalidRequest
from head import frames
from head.core import events as ev
from tests.component.test_head_sessions import Head, running
from tests.doubles.head_shell import FakeAgent, hello, until


async def _says(head: Head, agent: FakeAgent, frame: str) -> wire.Message | None:
    await agent.ws.send_str(frame)
    return await agent.hear()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("lease", {"seq": 1 << 61, "sent_boottime_ms": 1}),
        ("progress", {"op_id": "copy:x", "generation": 1, "state": "fetching", "bytes_total": 10**400}),
        ("result", {"op_id": "copy:x", "generation": 10**30, "outcome": "ok"}),
        ("leaving", {"reason": "x", "deadline_ms": 10**25}),
        ("log_chunk", {"request_id": "x", "offset": 1, "data": "x" * (2 * limits.LOG_CHUNK_BYTES + 1)}),
        ("result", {"op_id": "copy:x", "generation": 1, "outcome": "ok", "detail": {"x": "y" * 70_000}}),
        ("report", {"seq": 1, "runs": [{"run": "r", "generation": 1, "state": "armed", "digest": "d" * 129}]}),
        ("report", {"seq": 1, "runs": [{"run": "r" * 257, "generation": 1, "state": "armed"}]}),
        ("report", {"seq": 1, "runs": [{"run": f"r{n}", "generation": 1, "state": "done"} for n in range(1_001)]}),
    ],
)
async def test_a_frame_out_of_range_ends_the_session(kind: str, body: dict[str, object]) -> None:
    """Numbers nobody can compute with, and texts beyond their limits, never reach the core."""
    async with running() as head:
        agent = await head.join()
        before = len(head.events)
        answer = await _says(head, agent, json.dumps({"kind": kind, "body": body}))
        assert isinstance(answer, wire.Refused)
        assert answer.error.code == "invalid_request"
        assert not [event for event in head.events[before:] if not isinstance(event, ev.SessionClosed)]


async def test_a_revoked_key_ends_a_session_at_any_frame() -> None:
    """An agent that says no lease any more cannot stay by that: each frame is looked at."""
    async with running() as head:
        agent = await head.join()
        del head.state.keys["key-agent"]
        await agent.say(wire.Telemetry(cpu=0.5))
        answer = await agent.hear()
        assert isinstance(answer, wire.Refused)
        assert answer.error.code == "unauthenticated"
        assert not head.seen(ev.TelemetryReceived)


async def test_errors_of_agents_are_cut_to_size() -> None:
    """A long message is cut, details too deep to be written again are dropped, a code is a word."""
    deep: dict[str, object] = {}
    for _ in range(200):
        deep = {"a": deep}
    error = ErrorInfo("Not A Code\x1b[31m", "m" * 100_000, details=deep)
    async with running() as head:
        agent = await head.join()
        replica, run = (
            wire.ReplicaStatus("r", 1, "failed", error=error),
            wire.RunStatus("b.0.0", 1, "failed", error=error),
        )
        await agent.say(wire.Report(1, replicas=(replica,), runs=(run,)))
        await until(lambda: head.seen(ev.AgentReported))
        (said,) = head.seen(ev.AgentReported)
        assert isinstance(said, ev.AgentReported)
        for found in (said.report.replicas[0].error, said.report.runs[0].error):
            assert found is not None
            assert (found.code, len(found.message), found.details) == ("internal", frames.ERROR_CHARS, {})


@pytest.mark.parametrize(
    ("address", "peer", "is_good"),
    [
        ("10.0.0.7", "10.0.0.7", True),
        ("gpu-7.lab.example", "10.0.0.7", True),
        ("fd00::7", "10.0.0.7", True),
        ("", "10.0.0.7", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "10.0.0.7", False),
        ("localhost", "10.0.0.7", False),
        ("::ffff:127.0.0.1", "10.0.0.7", False),
        ("169.254.169.254", "169.254.1.1", False),
        ("0.0.0.0", "10.0.0.7", False),
        ("fe80::1%eth0", "10.0.0.7", False),
        ("evil/path", "10.0.0.7", False),
        ("a@b", "10.0.0.7", False),
        ("h\r\nX: y", "10.0.0.7", False),
    ],
)
async def test_an_advertised_address_cannot_point_into_the_head(address: str, peer: str, *, is_good: bool) -> None:
    """The head sends prompts there: not to its own machine for an agent elsewhere, not to link-local services."""
    try:
        frames.check_address(address, peer)
        assert is_good
    except InvalidRequest:
        assert not is_good


async def test_a_hello_that_bloats_the_state_is_refused() -> None:
    """An inventory beyond its limit, or an unprintable id, is never recorded."""
    good = hello("n1")
    too_big = msgspec.structs.replace(good, inventory=wire.Inventory("h", kernel="k" * 300_000))
    bad_id = msgspec.structs.replace(good, agent_id="a\x1b[2J")
    for said in (too_big, bad_id):
        async with running() as head:
            agent = await head.dial()
            await agent.say(said)
            assert isinstance(await agent.hear(), wire.Refused)
            assert head.journal.rows == []
