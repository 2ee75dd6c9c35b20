"""The wall clock of head and agent jumps by years, forth and back, under work: nothing changes.

Both run with a preloaded library that shifts CLOCK_REALTIME (tests/doubles/shift_clock.py). The head of this module
has leases of 3 s, which a clock that counted would have seen end at the first jump.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from tests.doubles.shift_clock import ShiftClock
from tests.e2e.cluster import FAST, Cluster, Head, stream_of
from tests.e2e.processes import stays, until

YEAR_S = 365 * 86_400
LEASES_S = 4.0  # a little more than one


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> ShiftClock:
    """The wall clock of the cluster."""
    return ShiftClock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, clock: ShiftClock) -> Iterator[Cluster]:
    """A head and the agent n1 with the service `chat`, all on that clock."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clock.environment().items():
            patch.setenv(name, value)
        with Cluster(tmp_path_factory.mktemp("clock") / "cluster", limits=FAST) as made:
            made.add_agent("n1")
            made.serve_tiny("chat", "n1")
            until(lambda: not made.client.health().is_settling, "a head that has settled")
            yield made


def year_of_log(head: Head) -> int:
    """The year that the head's last log line bears, by the wall clock."""
    return int(re.findall(r"^(\d{4})-\d\d-\d\dT", head.log(), re.MULTILINE)[-1])


@pytest.mark.parametrize("shift_s", [10 * YEAR_S, -20 * YEAR_S, 0], ids=["ahead", "behind", "right"])
def test_the_wall_clock_jumps(cluster: Cluster, clock: ShiftClock, shift_s: int) -> None:
    """Leases, engine, stream, keys, jobs and the head's own time go on as if nothing had happened."""
    client = cluster.client
    before = cluster.wait_replica("chat", lambda view: view.state == "ready")
    revision = max(line.revision for line in client.story("n1"))
    year = client.health().timestamp[:4]
    key = client.create_key("viewer", f"hour {shift_s}", ttl_s=3_600)
    with stream_of(before.endpoint, "chat", 20) as pieces:
        next(pieces)
        clock.jump_to(shift_s)
        assert len(list(pieces)) == 19
    cluster.head.signal(signal.SIGHUP)  # it logs a line, which shows that the jump reached it
    wall_year = datetime.now(UTC).year + shift_s // YEAR_S
    until(lambda: abs(year_of_log(cluster.head) - wall_year) <= 1, "a log line at the wall's time")
    name = f"after-{shift_s}"
    cluster.make_model(name, 200_000)
    cluster.download(name, "n1")
    stays(lambda: client.node("n1").state == "online", "n1 online", LEASES_S)
    after = cluster.wait_replica("chat", lambda view: view.state == "ready")
    assert (after.pid, after.generation, after.restarts) == (before.pid, before.generation, before.restarts)
    assert [line.what for line in client.story("n1") if line.revision > revision] == []
    assert cluster.head.call("GET", "/api/v1/nodes", token=key.token)[0] == 200
    assert client.health().timestamp[:4] == year
    assert cluster.chat("chat") == "w0 w1 w2 "


def test_a_head_starts_on_a_clock_that_was_set_back(cluster: Cluster, clock: ShiftClock) -> None:
    """Started with the wall clock years behind its journal, the head goes on where its own time stood."""
    before = cluster.wait_replica("chat", lambda view: view.state == "ready")
    last_ms = max(line.at_ms for line in cluster.client.story("n1"))
    sessions = cluster.agents["n1"].sessions()
    cluster.head.kill()
    clock.jump_to(-20 * YEAR_S)
    cluster.head.start()
    cluster.agents["n1"].wait_session(sessions + 1)
    assert cluster.client.health().timestamp_ms >= last_ms
    assert cluster.download("chat", "n1").created_ms >= last_ms
    after = cluster.wait_replica("chat", lambda view: view.state == "ready")
    assert (after.pid, after.generation, after.restarts) == (before.pid, before.generation, before.restarts)
