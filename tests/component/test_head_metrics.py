"""/metrics of the head: valid, complete, and cheap for a big cluster."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from common import wire
from common.clock import ManualClock
from head.core import events as ev
from head.core.effects import Alarm
from head.core.objects import Copy, Job, Node
from head.core.state import Live, State
from head.driver import Driver
from head.feed import Feed
from head.journal import Journal
from head.journal_schema import FILE_NAME
from head.metrics import Metrics
from head.sessions import Sessions
from tests.doubles.head_shell import NOW_MS, FakeIds, model, register, small_step, until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(metrics: Metrics) -> Samples:
    """What a Prometheus would read."""
    text = (await metrics.render()).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Head:
    """The parts that metrics look at, over a real journal."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal.open(folder / FILE_NAME)
        self.state = State()
        self.driver = Driver(self.state, self.journal, ManualClock(NOW_MS), Feed(), step=small_step)
        self.sessions = Sessions(self.driver, ManualClock(NOW_MS), FakeIds())
        self.metrics = Metrics("1.2.3")
        self.metrics.attach(self.driver, self.journal, self.sessions, self.driver.feed())

    async def __aenter__(self) -> Head:
        self.driver.start(self.sessions, with_ticks=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.driver.stop()
        self.journal.close()


async def test_everything_has_a_series(tmp_path: Path) -> None:
    """Work done shows: commits, records, events, frames, requests, objects by state, alarms, version."""
    async with Head(tmp_path) as head:
        node = Node("n1", "b", "a", "1", wire.Inventory("n1"), NOW_MS, "online", NOW_MS, 1, is_cordoned=True)
        head.state.nodes = {"n1": node, "n2": msgspec.structs.replace(node, id="n2")}
        head.state.live["n1"] = Live(session_id="ses-1")
        copies = [Copy("m", "main", device, "present", "ready", 1, "c", NOW_MS) for device in ("n1:disk", "n1:gpu0")]
        head.state.copies = {copy.key: copy for copy in copies}
        head.state.jobs["j"] = Job("j", "j", "me", "running", NOW_MS, ())
        await head.driver.submit(register("a"))
        head.driver.post(ev.LeaseRenewed("n1", "gone", wire.Lease(1, 1)))
        head.driver._release([Alarm("nodes_lost", "x")])
        head.sessions.counts.update({"in lease": 3, "out ack": 2, "refused_too_many": 1, "bad": 4})
        head.metrics.http("/api/v1/models/{name}", "GET", 200, 0.002)
        head.metrics.observe_lag(30)
        await until(lambda: head.driver.counts["LeaseRenewed"])
        samples = await scrape(head.metrics)
    expected: dict[str, float] = {
        'herder_build_info{version="1.2.3"}': 1,
        "herder_journal_records_total": 1,
        "herder_journal_commit_seconds_count": 1,
        "herder_journal_revision": 1,
        "herder_journal_read_only": 0,
        'herder_events_total{type="RegisterModelRequested"}': 1,
        'herder_events_total{type="LeaseRenewed"}': 1,
        'herder_nodes{state="online"}': 1,
        'herder_nodes{state="suspect"}': 1,
        'herder_nodes{state="unreachable"}': 0,
        "herder_nodes_cordoned": 2,
        "herder_models": 1,
        'herder_copies{kind="disk",state="ready"}': 1,
        'herder_copies{kind="gpu",state="ready"}': 1,
        'herder_jobs{state="running"}': 1,
        'herder_jobs{state="failed"}': 0,
        'herder_alarm{name="nodes_lost"}': 1,
        'herder_frames_total{direction="in",kind="lease"}': 3,
        'herder_frames_total{direction="out",kind="ack"}': 2,
        'herder_sessions_refused_total{code="too_many"}': 1,
        "herder_frames_bad_total": 4,
        "herder_loop_lag_seconds_count": 1,
        'herder_http_request_seconds_count{method="GET",route="/api/v1/models/{name}",status="200"}': 1,
    }
    found = {}
    for (name, labels), value in samples.items():
        inner = ",".join(f'{key}="{text}"' for key, text in labels)
        found[f"{name}{{{inner}}}" if inner else name] = value
    assert {name: found.get(name) for name in expected} == expected
    assert found["herder_process_resident_memory_bytes"] > 0


async def test_names_are_as_prometheus_wants_them(tmp_path: Path) -> None:
    """Every family has the prefix, a help text and a proper name; no series speaks of one node, GPU or model."""
    async with Head(tmp_path) as head:
        head.state.models["org/secret-model"] = model("org/secret-model")
        text = (await head.metrics.render()).decode()
    names = re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE)
    helps = dict(re.findall(r"^# HELP (\S+) (.*)", text, re.MULTILINE))
    assert len(names) > 25
    for name, kind in names:
        assert re.fullmatch(r"herder_[a-z0-9_]+", name), name
        assert helps[name], name
        assert (kind == "counter") == name.endswith("_total"), name
    assert "secret-model" not in text


async def test_a_scrape_of_a_big_cluster_lets_others_run(tmp_path: Path) -> None:
    """While 100,000 jobs are counted the loop turns many times, and two scrapes at once are both right."""
    async with Head(tmp_path) as head:
        job = Job("j", "j", "me", "completed", NOW_MS, ())
        for number in range(100_000):
            head.state.jobs[f"job-{number}"] = job
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(count_turns())
        first, second = await asyncio.gather(scrape(head.metrics), scrape(head.metrics))
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)
    assert turns > 20
    assert first["herder_jobs", (("state", "completed"),)] == 100_000
    assert second["herder_jobs", (("state", "completed"),)] == 100_000
