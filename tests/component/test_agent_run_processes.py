"""Runs of benchmarks as real processes that put load on a real server and send what they measured to a head's door."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from agent import procs
from agent.runs.directory import Identity
from common import limits, wire
from common.bench.outcome import Outcome
from common.bench.records import WIDTH
from common.clock import boottime_ns
from tests.doubles.run_rig import RUN, Door, rig
from tests.doubles.ws_head import until

SOON_NS = 300_000_000


@pytest.fixture
def door() -> Iterator[Door]:
    """A head's door and a server for load."""
    with Door() as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> object:
    """Whatever a test left running is killed."""
    yield
    for directory in tmp_path.glob("**/runs/*"):
        procs.kill_all(0, str(directory), within_s=5)


def fire(run: str = RUN, after_ns: int = SOON_NS) -> wire.FireRun:
    """A start in a moment."""
    return wire.FireRun(run, boottime_ns() + after_ns)


async def test_from_order_to_result(tmp_path: Path, door: Door) -> None:
    """A run is prepared, armed, fired, measured and sent; what arrives is what the server saw."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(token="s3cret", spec={"workers": 2})
        task = agent.state.runs[RUN]
        assert len(task.digest) == 64
        assert stat.S_IMODE((agent.directory().path / "order.json").stat().st_mode) == 0o600
        assert door.asked == []
        order = fire()
        agent.command(order)
        await agent.is_in("running")
        assert agent.state.runs[RUN].start_boottime_ns == order.start_boottime_ns
        result = await agent.result()
        assert (result.outcome, result.detail["artifacts"]) == ("ok", ["load.bin", "generator.log"])
        assert (await agent.result(f"fire:{RUN}")).outcome == "ok"
        asked, outcome = door.measured()
        assert len(asked.due_ns) == len(outcome.records) == len(door.asked)
        assert {headers["Authorization"] for headers in door.asked} == {"Bearer s3cret"}
        assert b"s3cret" not in door.files[f"{RUN}/load.bin"]
        assert b"armed" in door.files[f"{RUN}/generator.log"]
        assert sum(tick.sent for tick in agent.ticks) == len(door.asked) == agent.runs.totals.sent
        assert not (agent.directory().path / "order.json").exists()
        assert agent.members() == []


async def test_agent_is_replaced_in_the_middle(tmp_path: Path, door: Door) -> None:
    """The generator goes on without an agent; the next one finds the same process and sends its result."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"duration": 2.0})
        agent.command(fire())
        await until(lambda: len(door.asked) > 5, "load")
        pid = agent.state.runs[RUN].pid
    seen = len(door.asked)
    await until(lambda: len(door.asked) > seen + 5, "load without an agent")
    async with rig(tmp_path, door) as agent:
        await until(lambda: RUN in agent.runs.live, "the process")
        assert agent.runs.live[RUN].pid == pid
        assert (await agent.result()).outcome == "ok"
    assert len(door.measured()[1].records) == len(door.asked) == 100


async def test_armed_run_is_fired_by_the_next_agent(tmp_path: Path, door: Door) -> None:
    """An armed generator waits through the end of its agent."""
    async with rig(tmp_path, door) as agent:
        await agent.armed()
    async with rig(tmp_path, door) as agent:
        agent.command(fire())
        assert (await agent.result()).outcome == "ok"


async def test_run_ends_while_nobody_looks(tmp_path: Path, door: Door) -> None:
    """What was measured without an agent is found and sent by the next one."""
    async with rig(tmp_path, door) as agent:
        await agent.armed()
        agent.command(fire())
        await agent.is_in("running")
        directory = agent.directory()
    await until(lambda: (status := directory.status()) and status.state == "ended", "the end")
    async with rig(tmp_path, door) as agent:
        assert (await agent.result()).outcome == "ok"
    assert len(door.measured()[1].records) == 50


async def test_generator_is_killed(tmp_path: Path, door: Door) -> None:
    """SIGKILL to the generator fails the run with the end of its log; its workers do not load the server on."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"duration": 60.0, "workers": 2})
        agent.command(fire())
        await until(lambda: len(door.asked) > 5, "load")
        assert len(agent.members()) == 3
        for pid in agent.members():
            os.kill(pid, signal.SIGSTOP)  # a worker that hears nothing does not end by itself either
        os.kill(agent.state.runs[RUN].pid, signal.SIGKILL)
        result = await agent.result()
        assert (result.outcome, result.error and result.error.code) == ("failed", "run_failed")
        assert result.error is not None
        assert "signal 9" in result.error.message
        assert any("running" in line for line in result.detail["last_log"])
        assert agent.members() == []


async def test_generator_hangs(tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that does not end at its stop_after is killed with its workers a while later."""
    monkeypatch.setattr(limits, "RUN_STOP_GRACE_MS", 500)
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"duration": 60.0}, stop_after_ms=3_000)
        for pid in agent.members():
            os.kill(pid, signal.SIGSTOP)
        result = await agent.result()
        assert (result.outcome, result.error and result.error.code) == ("failed", "timed_out")
        await until(lambda: agent.members() == [], "the end of every process")
        await until(lambda: agent.runs.live == {}, "nothing that is watched")


async def test_worker_is_killed_before_the_start(tmp_path: Path, door: Door) -> None:
    """An armed run that lost a worker fails at once instead of measuring half of what was asked."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"workers": 2})
        (worker, *_) = [pid for pid in agent.members() if pid != agent.state.runs[RUN].pid]
        os.kill(worker, signal.SIGKILL)
        result = await agent.result()
        assert result.error is not None
        assert "before the start" in result.error.message


async def test_every_worker_is_killed(tmp_path: Path, door: Door) -> None:
    """Without any worker nothing was measured: the run fails, and tells by what signal they went."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"duration": 60.0})
        agent.command(fire())
        await until(lambda: len(door.asked) > 5, "load")
        (worker,) = [pid for pid in agent.members() if pid != agent.state.runs[RUN].pid]
        os.kill(worker, signal.SIGKILL)
        result = await agent.result()
        assert (result.outcome, result.error and result.error.code) == ("failed", "run_failed")
        assert result.error is not None
        assert result.error.message.endswith("came to its end: one was killed by signal 9")


async def test_node_is_rebooted(tmp_path: Path, door: Door) -> None:
    """A run that a reboot cut off has failed, and its log still tells how far it was."""
    async with rig(tmp_path, door, boot_id="boot-before") as agent:
        await agent.armed(spec={"duration": 60.0})
        agent.command(fire())
        await agent.is_in("running")
        directory = agent.directory()
    procs.kill_all(0, str(directory.path), within_s=5)
    identity = directory.read("pid.json", Identity)
    assert identity is not None
    directory.write("pid.json", Identity("boot-before", identity.pid, identity.ticks))
    async with rig(tmp_path, door) as agent:
        result = await agent.result()
        assert result.error is not None
        assert (result.error.code, "rebooted" in result.error.message) == ("run_failed", True)
        assert any("running" in line for line in result.detail["last_log"])
        assert agent.members() == []


async def test_forget_ends_everything(tmp_path: Path, door: Door) -> None:
    """`forget` kills every process of the run and deletes its directory."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"duration": 60.0, "workers": 2})
        agent.command(fire())
        await until(lambda: RUN in agent.runs.totals.in_flight, "a second of load")
        agent.command(wire.EndRun(RUN, "forget"))
        assert (await agent.result(f"end:{RUN}")).outcome == "ok"
        assert (await agent.result()).outcome == "cancelled"
        assert agent.members() == []
        assert not agent.directory().path.exists()
        assert agent.runs.live == {}
        assert agent.runs.totals.in_flight == {}


async def test_forget_while_it_is_prepared(tmp_path: Path, door: Door) -> None:
    """A run that is just being made is forgotten as well as any other."""
    async with rig(tmp_path, door) as agent:
        agent.command(agent.order())
        agent.command(wire.EndRun(RUN, "forget"))
        assert (await agent.result(f"end:{RUN}")).outcome == "ok"
        assert agent.members() == []
        assert not agent.directory().path.exists()


async def test_forget_of_a_process_that_shows_no_environment_yet(
    tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is ended with its run before Linux shows its environment, and so the mark that it carries."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"duration": 60.0})
        task = agent.state.runs[RUN]
        with monkeypatch.context() as patched:
            patched.setattr(procs, "_environment", lambda pid: [])
            agent.command(wire.EndRun(RUN, "forget"))
            assert (await agent.result(f"end:{RUN}")).outcome == "ok"
        assert not procs.is_running(task.pid, task.start_ticks)
        assert agent.members() == []


async def test_finish_keeps_what_was_measured(tmp_path: Path, door: Door) -> None:
    """`finish` ends the sending; the result says that it was cut short and holds every answered request."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"duration": 60.0})
        agent.command(fire())
        await until(lambda: len(door.asked) > 5, "load")
        agent.command(wire.EndRun(RUN, "finish"))
        assert (await agent.result()).outcome == "ok"
        outcome = door.measured()[1]
        assert outcome.is_interrupted
        assert len(outcome.records) == len(door.asked)


async def test_finish_before_the_start(tmp_path: Path, door: Door) -> None:
    """An armed run that shall finish is cancelled and sends nothing."""
    async with rig(tmp_path, door) as agent:
        await agent.armed()
        agent.command(wire.EndRun(RUN, "finish"))
        assert (await agent.result()).outcome == "cancelled"
        assert door.asked == []


async def test_ends_by_itself(tmp_path: Path, door: Door) -> None:
    """With stop_after the run ends without agent and head, and what it measured says so."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"duration": 60.0}, stop_after_ms=4_000)
        agent.command(fire(after_ns=0))
        await agent.is_in("running")
        directory = agent.directory()
    await until(lambda: (status := directory.status()) and status.state == "ended", "the end by itself")
    async with rig(tmp_path, door) as agent:
        assert (await agent.result()).outcome == "ok"
    assert any("stop_after" in line for line in door.measured()[1].said)


async def test_nobody_fires(tmp_path: Path, door: Door) -> None:
    """An armed run ends at its stop_after and says that nobody told it to begin."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(stop_after_ms=3_000)
        result = await agent.result()
        assert (result.outcome, result.error and result.error.code) == ("failed", "timed_out")


async def test_start_in_the_past(tmp_path: Path, door: Door) -> None:
    """A start that has passed begins at once; run and result say how late."""
    async with rig(tmp_path, door) as agent:
        await agent.armed()
        order = fire(after_ns=-2_000_000_000)
        agent.command(order)
        result = await agent.result()
        assert result.detail["late_ms"] >= 2_000
        began_ns = result.detail["start_boottime_ns"]
        assert abs(began_ns - order.start_boottime_ns - result.detail["late_ms"] * 1_000_000) <= 2_000_000
        assert any("after the ordered start" in line for line in door.measured()[1].said)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"rate": None}, "say how much load"),
        ({"arrivals": "sideways"}, "arrivals"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"api": "chat"}, "model is missing"),
    ],
)
async def test_order_that_cannot_be_performed(tmp_path: Path, door: Door, spec: dict[str, object], words: str) -> None:
    """A spec that cannot be performed fails with a code and a sentence."""
    async with rig(tmp_path, door) as agent:
        agent.command(agent.order(spec=spec))
        result = await agent.result()
        assert result.error is not None
        assert (result.error.code, words in result.error.message) == ("invalid_value", True), result.error


class TestFiles:
    """What a spec may read on a load node."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """A directory that may be read, with a link that leads out of it."""
        root = tmp_path / "data"
        root.mkdir()
        (root / "body.json").write_text('{"allowed": true}')
        (tmp_path / "secret.json").write_text('{"secret": true}')
        (root / "way_out.json").symlink_to(tmp_path / "secret.json")
        return root

    @pytest.mark.parametrize(
        ("field", "name", "code"),
        [
            ("body", "{root}/../secret.json", "forbidden"),
            ("body", "{root}/way_out.json", "forbidden"),
            ("body", "/etc/passwd", "forbidden"),
            ("trace", "/etc/passwd", "forbidden"),
            ("tokenizer", "/etc/passwd", "forbidden"),
            ("dataset", "/etc/passwd:text", "forbidden"),
            ("body", "body.json", "invalid_value"),
            ("body", "{root}/missing.json", "source_not_found"),
            ("body", "{root}", "invalid_source"),
        ],
    )
    async def test_refused(self, tmp_path: Path, door: Door, root: Path, field: str, name: str, code: str) -> None:
        """What lies outside the roots, by whatever way, is not opened."""
        async with rig(tmp_path, door, file_roots=(str(root),)) as agent:
            spec = {"method": "POST", field: name.format(root=root)}
            agent.command(agent.order(spec=spec))
            result = await agent.result()
            assert result.error is not None
            assert result.error.code == code, result.error
            assert door.asked == []

    async def test_off_without_roots(self, tmp_path: Path, door: Door, root: Path) -> None:
        """An agent without file_roots reads nothing for anybody."""
        async with rig(tmp_path, door) as agent:
            agent.command(agent.order(spec={"method": "POST", "body": f"{root}/body.json"}))
            result = await agent.result()
            assert result.error is not None
            assert result.error.code == "forbidden"

    async def test_within_the_roots(self, tmp_path: Path, door: Door, root: Path) -> None:
        """A file below a root is used, and its kind is told by its own name."""
        (root / "rows.csv").write_text("prompt\nhello\nworld\n")
        async with rig(tmp_path, door, file_roots=(str(root),)) as agent:
            await agent.armed(spec={"method": "POST", "body": f"{root}/body.json"})
            await agent.armed("b1.0.1", {"api": "chat", "model": "m", "dataset": f"{root}/rows.csv"})
            agent.command(fire())
            assert (await agent.result()).outcome == "ok"
            assert {headers["Content-Length"] for headers in door.asked} == {"17"}


@pytest.mark.parametrize(
    ("urls", "spec"),
    [
        (("http://169.254.169.254/latest",), {}),
        (("http://127.0.0.1:1/", "http://[::ffff:169.254.169.254]/"), {}),
        (("http://127.0.0.1:1",), {"api": "chat", "model": "m", "tokenizer": "server:http://169.254.169.254"}),
    ],
)
async def test_metadata_services_are_not_asked(
    tmp_path: Path, door: Door, urls: tuple[str, ...], spec: dict[str, object]
) -> None:
    """Neither load nor questions of its preparation go to a cloud's metadata service."""
    async with rig(tmp_path, door) as agent:
        agent.command(agent.order(urls=urls, spec=spec))
        result = await agent.result()
        assert result.error is not None
        assert result.error.code == "address_refused", result.error


async def test_link_local_targets_where_allowed(tmp_path: Path, door: Door) -> None:
    """The node's setting lets load go there."""
    async with rig(tmp_path, door, allow_link_local=True) as agent:
        await agent.armed(urls=("http://169.254.169.254:1/latest",))
        assert not [message for message in agent.sent if isinstance(message, wire.Result)]  # it was not refused


async def test_host_without_an_address(tmp_path: Path, door: Door) -> None:
    """A name that nobody knows is told as such."""
    async with rig(tmp_path, door) as agent:
        agent.command(agent.order(urls=("http://no-such-host.invalid:80/",)))
        result = await agent.result()
        assert result.error is not None
        assert (result.error.code, "no address" in result.error.message) == ("invalid_value", True), result.error


class TestMonitor:
    """The other kind of run."""

    def order(self, **fields: Any) -> wire.EnsureRun:
        """An order for the monitor."""
        return wire.EnsureRun(RUN, "monitor", {"interval": 0.2, "engines": []}, **fields)

    async def test_samples_until_it_is_told_to_end(self, tmp_path: Path, door: Door) -> None:
        """It begins by itself, outlives its agent, and at `finish` its files go to the head."""
        async with rig(tmp_path, door) as agent:
            agent.command(self.order())
            await agent.is_in("running")
            path = agent.directory().path / "monitor.csv"
        await until(lambda: path.exists() and path.read_bytes().count(b"\n") > 5, "samples without an agent")
        async with rig(tmp_path, door) as agent:
            agent.command(wire.EndRun(RUN, "finish"))
            result = await agent.result()
            assert result.outcome == "ok", result.error
            assert {"monitor.csv", "engine.csv"} <= set(result.detail["artifacts"])
            assert agent.members() == []
        assert door.files[f"{RUN}/monitor.csv"].count(b"\n") > 5

    async def test_told_to_end_at_once(self, tmp_path: Path, door: Door) -> None:
        """An end that comes with the order waits until there is something to end."""
        async with rig(tmp_path, door) as agent:
            agent.command(self.order())
            agent.command(wire.EndRun(RUN, "finish"))
            result = await agent.result()
            assert result.outcome == "ok", result.error

    async def test_ends_by_itself(self, tmp_path: Path, door: Door) -> None:
        """With stop_after it ends without anybody, and its files are sent."""
        async with rig(tmp_path, door) as agent:
            agent.command(self.order(stop_after_ms=2_000))
            result = await agent.result()
            assert result.outcome == "ok", result.error

    async def test_killed(self, tmp_path: Path, door: Door) -> None:
        """A monitor that is gone failed; it is not started again behind its own back."""
        async with rig(tmp_path, door) as agent:
            agent.command(self.order())
            await until(lambda: agent.directory().status(), "its first word")
            os.kill(agent.state.runs[RUN].pid, signal.SIGKILL)
            result = await agent.result()
            assert result.error is not None
            assert "the monitor was killed by signal 9" in result.error.message


class TestSending:
    """What was measured goes to the head, whatever the head does meanwhile."""

    async def test_head_in_trouble(self, tmp_path: Path, door: Door) -> None:
        """Answers that may change are asked for again."""
        door.answers = [503, 500, 401]
        async with rig(tmp_path, door) as agent:
            await agent.armed(spec={"duration": 0.2})
            agent.command(fire())
            assert (await agent.result()).outcome == "ok"
        assert door.puts == [f"{RUN}/load.bin"] * 4 + [f"{RUN}/generator.log"]

    async def test_head_is_restarted(self, tmp_path: Path, door: Door) -> None:
        """A head that is away gets the files when it is back."""
        with Door() as target:
            async with rig(tmp_path, door) as agent:
                await agent.armed(spec={"duration": 0.2}, urls=(f"{target.url}/work",))
                door.close()
                agent.command(fire())
                await agent.is_in("uploading")
                door.open()
                assert (await agent.result()).outcome == "ok"
            assert len(door.measured()[1].records) == len(target.asked) > 0

    async def test_next_agent_sends(self, tmp_path: Path, door: Door) -> None:
        """An agent that ends while it sends leaves it to the next one."""
        door.answers = [503] * 1_000
        async with rig(tmp_path, door) as agent:
            await agent.armed(spec={"duration": 0.2})
            agent.command(fire())
            await until(lambda: door.puts, "an attempt")
        door.answers = []
        async with rig(tmp_path, door) as agent:
            assert (await agent.result()).outcome == "ok"

    async def test_head_refuses(self, tmp_path: Path, door: Door) -> None:
        """A refusal that no repeat can change is the run's error, in the head's own words."""
        door.answers = [409]
        async with rig(tmp_path, door) as agent:
            await agent.armed(spec={"duration": 0.2})
            agent.command(fire())
            result = await agent.result()
            assert result.error is not None
            assert (result.error.code, result.error.message) == ("in_use", "not now")
        assert len(door.puts) == 1

    async def test_forgotten_meanwhile(self, tmp_path: Path, door: Door) -> None:
        """What the head does not want any more is not offered again."""
        door.answers = [503] * 1_000
        async with rig(tmp_path, door) as agent:
            await agent.armed(spec={"duration": 0.2})
            agent.command(fire())
            await until(lambda: door.puts, "an attempt")
            agent.command(wire.EndRun(RUN, "forget"))
            assert (await agent.result(f"end:{RUN}")).outcome == "ok"
            assert [task for task in agent.tasks.names if "upload" in task] == []


def lose_ledger(root: Path) -> None:
    """The ledger is gone."""
    for path in root.glob("ledger.db*"):
        path.unlink()


async def test_what_a_lost_ledger_leaves(tmp_path: Path, door: Door) -> None:
    """Without its ledger an agent ends runs that nobody could end any more, and keeps few of their directories."""
    async with rig(tmp_path, door) as agent:
        await agent.armed(spec={"duration": 60.0})
        agent.command(fire())
        await until(lambda: len(door.asked) > 5, "load")
    lose_ledger(tmp_path)
    for number in range(limits.RUNS_KEPT + 5):
        old = tmp_path / "runs" / f"old.{number}"
        old.mkdir()
        (old / "order.json").write_text("{}")
        os.utime(old, (time.time() - 1_000 + number,) * 2)
    async with rig(tmp_path, door) as agent:
        assert agent.members() == []
        assert len(agent.files.names()) == limits.RUNS_KEPT
        assert "old.0" not in agent.files.names()
        assert list((tmp_path / "runs").glob("*/order.json")) == []


async def test_nothing_is_done_without_runs(tmp_path: Path, door: Door) -> None:
    """An agent without runs has no task that looks for any."""
    async with rig(tmp_path, door) as agent:
        await agent.driver.settled()
        assert [name for name in agent.tasks.names if "run" in name] == []
        await agent.armed(spec={"duration": 0.2})
        agent.command(fire())
        await agent.result()
        await until(lambda: not [name for name in agent.tasks.names if "run" in name], "rest")


async def test_process_gets_nothing_of_ours(tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's environment holds no variable of the agent but what engines get too."""
    monkeypatch.setenv("HERDER_AGENT_TOKEN_FILE", "/ours")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    async with rig(tmp_path, door) as agent:
        await agent.armed()
        seen = (Path("/proc") / str(agent.state.runs[RUN].pid) / "environ").read_bytes()
        names = {entry.partition(b"=")[0].decode() for entry in seen.split(b"\0") if entry}
        assert "PYTHONSAFEPATH" in names
        assert not names & {"HERDER_AGENT_TOKEN_FILE", "HTTPS_PROXY", "VIRTUAL_ENV"}


def rows_of(outcome: Outcome) -> list[tuple[int, ...]]:
    """Every raw sample."""
    rows = outcome.records.rows
    return [tuple(rows[at : at + WIDTH]) for at in range(0, len(rows), WIDTH)]


def began_ms(outcome: Outcome, asked_wall_s: float) -> float:
    """How far from the ordered moment a part really began: its clock's error and the lateness of its first send."""
    scheduled, acted = min(outcome.records.columns("scheduled", "acted"))
    return (outcome.start_wall_s - asked_wall_s) * 1e3 + (acted - scheduled) / 1e6


async def test_eight_parts_are_one_run(tmp_path: Path, door: Door) -> None:
    """Eight agents of one machine prepare equal parts, begin at one moment, and together hold every raw sample."""
    parts = 8
    async with AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(rig(tmp_path / f"n{part}", door)) for part in range(parts)]
        spec = {"arrivals": "poisson", "rate": 200, "duration": 2.0, "seed": 7}
        for part, agent in enumerate(agents):
            agent.command(agent.order(f"b1.0.{part}", spec, part=part, parts=parts))
        for part, agent in enumerate(agents):
            await agent.is_in("armed", f"b1.0.{part}")
        tasks = [agent.state.runs[f"b1.0.{part}"] for part, agent in enumerate(agents)]
        assert len({task.digest for task in tasks}) == 1
        start_ns = boottime_ns() + 1_000_000_000
        asked_wall_s = time.time() + (start_ns - boottime_ns()) / 1e9
        for part, agent in enumerate(agents):
            agent.command(wire.FireRun(f"b1.0.{part}", start_ns))
        for part, agent in enumerate(agents):
            result = await agent.result(f"run:b1.0.{part}")
            assert (result.outcome, result.detail["late_ms"]) == ("ok", 0)
    measured = [door.measured(f"b1.0.{part}") for part in range(parts)]
    assert all(asked.due_ns == measured[0][0].due_ns for asked, _ in measured)
    began = sorted(began_ms(outcome, asked_wall_s) for _, outcome in measured)
    sys.stdout.write(f"eight parts began {began[0]:.3f} to {began[-1]:.3f} ms after the ordered moment\n")
    assert began[-1] - began[0] < 5_000
    assert max(map(abs, began)) < 5_000
    raw = sorted(row for _, outcome in measured for row in rows_of(outcome))
    whole = measured[0][1]
    for _, outcome in measured[1:]:
        whole.merge(outcome)
    assert sorted(rows_of(whole)) == raw
    assert len(raw) == len(measured[0][0].due_ns) == len(door.asked)
