"""Reports in pages: cut by the agent to fit the link, believed by the head only when all of them are there."""

from __future__ import annotations

import itertools
import random

import msgspec
import pytest

from agent.core import events as agent_events
from agent.core.session import report_pages
from common import limits, wire
from common.errors import ErrorInfo
from head.core.effects import CloseSession
from head.core.events import AgentReported
from tests.doubles.agent_node import Node, ensure_copy, manifest_of
from tests.doubles.head_core import GIB, World, manifest

MANY = 20_000


def status(number: int, *, words: int = 0) -> wire.CopyStatus:
    """A copy with long names; `words`: of its error."""
    error = ErrorInfo("fetch_failed", "w" * words, "h" * words) if words else None
    return wire.CopyStatus(f"{'o' * 90}/{number:090d}", "main", "disk", "ready", digest="b3:" + "0" * 64, error=error)


def whole(count: int, *, words: int = 0) -> wire.Report:
    """A report of so many copies."""
    ops = tuple(wire.OpStatus(f"copy:{number}", 1, "running") for number in range(count // 10))
    replicas = tuple(wire.ReplicaStatus(f"chat-{number}", 1, "ready") for number in range(min(count, 50)))
    copies = tuple(status(number, words=words) for number in range(count))
    return wire.Report(7, copies, replicas, ops, digest=99)


class TestCutting:
    """What the agent sends."""

    @pytest.mark.parametrize("count", [0, 1, 500, MANY])
    def test_pages_hold_everything_once_and_in_order(self, count: int) -> None:
        """Put together they are the report; each fits a frame; a small report is one page as ever."""
        report = whole(count)
        pages = report_pages(report)
        assert tuple(itertools.chain.from_iterable(page.copies for page in pages)) == report.copies
        assert tuple(itertools.chain.from_iterable(page.replicas for page in pages)) == report.replicas
        assert tuple(itertools.chain.from_iterable(page.ops for page in pages)) == report.ops
        assert [(page.page, page.pages, page.seq, page.digest) for page in pages] == [
            (index, len(pages), 7, 99) for index in range(len(pages))
        ]
        assert all(len(wire.encode(page)) <= limits.REPORT_PAGE_BYTES + 10_000 for page in pages)
        assert (len(pages) == 1) == (count <= 500)

    def test_errors_are_shortened_where_there_would_be_too_many_pages(self) -> None:
        """20,000 copies that failed with long words still make a report that the head takes."""
        pages = report_pages(whole(MANY, words=2_000))
        assert 1 < len(pages) <= limits.REPORT_PAGES
        errors = [copy.error for page in pages for copy in page.copies]
        assert all(error is not None and error.code == "fetch_failed" for error in errors)
        assert all(error is not None and len(error.message) == 100 for error in errors)

    def agent(self, *features: str) -> Node:
        """An agent whose store holds 20,000 copies nobody ordered, in a session with a head of these features."""
        node = Node()
        for copy in map(status, range(MANY)):
            node.store[f"{copy.model}@main"] = manifest_of(copy.model, "main", 1)
        node.start()
        node.session_id = "s-1"
        welcome = wire.Welcome(1, "cluster-1", 1, "s-1", 15_000, 5_000, 0, "a2V5", features)
        node.sent.clear()
        node.post(agent_events.SessionOpened("s-1", "n1", welcome))
        return node

    def test_pages_leave_one_at_a_time(self) -> None:
        """So the link's outbox never holds more than a page or two; what changes meanwhile follows afterwards."""
        node = self.agent(wire.FEATURE_REPORT_PAGES)
        said = [message for message in node.sent if isinstance(message, wire.Report)]
        assert [(page.page, page.pages > 5) for page in said] == [(0, True)]
        node.post(agent_events.LeaseAcked(node.now_ms, 15_000, wants_report=True))
        for _ in range(2 * said[0].pages):
            node.now_ms += limits.REPORT_SPACING_MS
            node.post(agent_events.Ticked())
        said = [message for message in node.sent if isinstance(message, wire.Report)]
        assert [page.page for page in said] == list(range(said[0].pages)), "an impatient head does not start it anew"
        assert {page.seq for page in said} == {said[0].seq}
        assert sum(len(page.copies) for page in said) == MANY
        node.post(agent_events.LeaseAcked(node.now_ms, 15_000, wants_report=True))
        assert [message for message in node.sent if isinstance(message, wire.Report)][-1].seq == said[0].seq + 1

    def test_the_core_wakes_itself_for_the_next_page(self) -> None:
        """No other event is needed."""
        node = self.agent(wire.FEATURE_REPORT_PAGES)
        assert node.state.wake_ms <= node.now_ms + limits.REPORT_SPACING_MS

    def test_an_older_head_gets_one_frame(self) -> None:
        """It would take the first page for everything."""
        node = self.agent()
        (report,) = [message for message in node.sent if isinstance(message, wire.Report)]
        assert (report.page, report.pages, len(report.copies)) == (0, 1, MANY)

    def test_a_session_that_ends_forgets_its_pages(self) -> None:
        """The next session begins with a report of its own."""
        node = self.agent(wire.FEATURE_REPORT_PAGES)
        node.close()
        assert node.state.pages_left == ()
        node.sent.clear()
        node.open()
        (report,) = [message for message in node.sent if isinstance(message, wire.Report)]
        assert report.page == 0


def world() -> World:
    """A head with a copy that is ready on n1."""
    made = World()
    made.join("n1")
    made.register("m", "https://origin/m")
    return made


def page(world: World, report: wire.Report) -> list[object]:
    """A page arrives."""
    return list(world.step(AgentReported(node="n1", session_id=world.session("n1"), report=report)))


class TestTaking:
    """What the head believes."""

    def pages(self, world: World, seq: int = 1_000) -> list[wire.Report]:
        """A report of three pages; the copy that the head knows is in the last."""
        unknown = [wire.CopyStatus(f"x{number}", "main", "disk", "ready", bytes_total=GIB) for number in range(2)]
        known = wire.CopyStatus("m", "main", "disk", "ready", 1, digest=manifest("m", 10).digest)
        return [wire.Report(seq, (one,), digest=5, page=index, pages=3) for index, one in enumerate([*unknown, known])]

    @pytest.mark.parametrize("seed", range(6))
    def test_nothing_counts_before_all_are_there(self, seed: int) -> None:
        """In any order and repeated: the last one that was missing completes it, and then it counts as one report."""
        made = world()
        live = made.state.live["n1"]
        arriving = self.pages(made)
        random.Random(seed).shuffle(arriving)
        before = made.state.revision
        for one in arriving[:-1]:
            page(made, one)
            page(made, one)
            assert live.unknown_copies == ()
            assert live.report_digest != 5
            assert made.state.revision == before
        page(made, arriving[-1])
        assert {copy.model for copy in live.unknown_copies} == {"x0", "x1"}
        assert live.report_digest == 5
        assert [copy.model for copy in made.state.copies.values()] == ["m"]
        assert not live.report_pages

    def test_a_copy_in_a_later_page_is_not_missing(self) -> None:
        """A page that leaves out a known copy does not make it lost."""
        made = world()
        for one in self.pages(made):
            page(made, one)
        key, copy = next(iter(made.state.copies.items()))
        for one in self.pages(made, seq=1_001)[:2]:
            page(made, one)
        assert made.state.copies[key] == copy

    def test_a_session_that_ends_halfway_leaves_nothing(self) -> None:
        """Its pages go with it, and the next session's are not mixed with them."""
        made = world()
        for one in self.pages(made)[:2]:
            page(made, one)
        made.close("n1")
        assert not made.state.live["n1"].report_pages
        made.join("n1")
        page(made, self.pages(made)[2])
        assert made.state.live["n1"].unknown_copies == ()
        assert not made.state.copies

    def test_a_newer_report_takes_the_place_of_half_an_older(self) -> None:
        """Pages of two reports are never put together, and late ones of the older are left alone."""
        made = world()
        older, newer = self.pages(made), self.pages(made, seq=1_001)
        page(made, older[0])
        page(made, newer[1])
        page(made, newer[2])
        page(made, older[1])
        page(made, older[2])
        assert made.state.live["n1"].unknown_copies == ()
        page(made, newer[0])
        assert len(made.state.live["n1"].unknown_copies) == 2

    def test_a_lease_asks_again_while_pages_are_missing(self) -> None:
        """A page that was lost costs a lease's time."""
        made = world()
        for one in self.pages(made)[:2]:
            page(made, one)
        acks = [effect.message for effect in made.lease("n1", digest=5) if hasattr(effect, "message")]
        assert [ack.wants_report for ack in acks if isinstance(ack, wire.Ack)] == [True]

    @pytest.mark.parametrize(
        ("number", "count"), [(3, 3), (-1, 3), (0, limits.REPORT_PAGES + 1), (1, 1), (0, 0), (0, -2)]
    )
    def test_pages_that_cannot_be_end_the_session(self, number: int, count: int) -> None:
        """Nothing is kept of them."""
        made = world()
        effects = page(made, wire.Report(1_000, page=number, pages=count))
        assert any(isinstance(effect, CloseSession) for effect in effects)
        assert not made.state.live["n1"].report_pages

    def test_pages_together_name_no_more_than_a_node_can_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The limit of one frame is the limit of all of them."""
        monkeypatch.setattr(limits, "COPIES_PER_NODE", 2)
        made = world()
        effects = [effect for one in self.pages(made) for effect in page(made, one)]
        assert any(isinstance(effect, CloseSession) for effect in effects)
        assert made.state.live["n1"].unknown_copies == ()


def test_twenty_thousand_copies_from_agent_to_head() -> None:
    """The real core at both ends: every page passes the codec within a frame, and the head lists every copy."""
    node = TestCutting().agent(wire.FEATURE_REPORT_PAGES)
    node.post(agent_events.CommandReceived(_command(node)))
    made = world()
    for _ in range(60):
        node.now_ms += limits.REPORT_SPACING_MS
        node.post(agent_events.Ticked())
    for message in node.sent:
        frame = wire.encode(message)
        assert len(frame) <= limits.FRAME_BYTES
        decoded = wire.decode(frame)
        if isinstance(decoded, wire.Report):
            page(made, msgspec.structs.replace(decoded, seq=decoded.seq + 1_000))
    assert len(made.state.live["n1"].unknown_copies) >= MANY - 1
    assert made.state.live["n1"].report_digest == node.state.digest


def _command(node: Node) -> wire.Command:
    return wire.Command("copy:org/m@main|n1:disk", 5, node.epoch, "test", ensure_copy())
