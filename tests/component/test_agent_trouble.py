"""What a person gets to see when something on a node is missing: every order ends with a reason, and heals."""

from __future__ import annotations

import os
from pathlib import Path

from common import wire
from tests.doubles.agent_daemon import DISK, DRAM, REPLICA, Node, ensure_copy, ensure_replica, node
from tests.doubles.ws_head import until


async def starts_with_a_copy(n: Node) -> None:
    """The agent runs, and its model is on the disk (order 1)."""
    await n.start()
    await n.connected(1)
    await n.head.command(ensure_copy(n.models), 1, DISK)
    await n.done(DISK, 1)


async def heals(n: Node, order: wire.EnsureCopy, op_id: str) -> None:
    """The order, given again and again as the head does, succeeds in the end (from order 3 on)."""
    for generation in range(3, 100):
        await n.head.command(order, generation, op_id)
        await until(lambda: n.head.result(op_id, generation), "a result")  # noqa: B023 - awaited here
        result = n.head.result(op_id, generation)
        assert result is not None
        if result.outcome == "ok":
            return
    raise AssertionError("it never healed")


async def test_holder_that_does_not_start(tmp_path: Path) -> None:
    """The RAM tier's socket cannot be made: the order fails with that, retryable; once it can, the next one works."""
    async with node(tmp_path) as n:
        (tmp_path / "state").mkdir(mode=0o700)
        (tmp_path / "state/holder").write_text("a file where a folder must be")
        await starts_with_a_copy(n)
        await n.head.command(ensure_copy(n.models, "dram"), 2, DRAM)
        error = await n.failed(DRAM, 2)
        assert error.is_retryable
        assert "RAM tier does not start" in error.message
        (tmp_path / "state/holder").unlink()
        await heals(n, ensure_copy(n.models, "dram"), DRAM)


async def test_holder_that_ends_at_start_says_why(tmp_path: Path) -> None:
    """The last line of a holder that ended stands in the error."""
    async with node(tmp_path) as n:
        holder = tmp_path / "state/holder"
        holder.mkdir(parents=True)
        (tmp_path / "state").chmod(0o700)
        (holder / "holder.sock").mkdir()  # can be neither connected to, removed, nor bound
        await starts_with_a_copy(n)
        await n.head.command(ensure_copy(n.models, "dram"), 2, DRAM)
        error = await n.failed(DRAM, 2)
        assert "the holder ended with 1" in error.message
        assert "Error" in error.message
        (holder / "holder.sock").rmdir()


async def test_node_without_a_ram_tier(tmp_path: Path) -> None:
    """A node whose RAM budget is nothing refuses RAM copies at once, for good."""
    async with node(tmp_path) as n:
        n.settings["dram_budget_bytes"] = 0
        n.write()
        await starts_with_a_copy(n)
        await n.head.command(ensure_copy(n.models, "dram"), 2, DRAM)
        error = await n.failed(DRAM, 2)
        assert "no RAM tier" in error.message
        assert not error.is_retryable


async def test_mover_that_does_not_start(tmp_path: Path) -> None:
    """A store that cannot be used: fetches and drops fail with the mover's own words, and heal with it."""
    async with node(tmp_path) as n:
        (tmp_path / "store").mkdir()
        (tmp_path / "store/models").write_text("a file where a folder must be")
        n.settings["store_dir"] = str(tmp_path / "store")
        n.write()
        await n.start()
        await n.connected(1)
        await n.head.command(ensure_copy(n.models), 1, DISK)
        error = await n.failed(DISK, 1)
        assert error.is_retryable
        assert "mover does not start" in error.message
        assert "models" in error.message
        await n.head.command(wire.DropCopy("org/m", "main", "disk"), 2, DISK)
        assert "mover does not start" in (await n.failed(DISK, 2)).message
        (tmp_path / "store/models").unlink()
        await heals(n, ensure_copy(n.models), DISK)


async def test_store_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """A store folder that cannot be made ends the start with status 2 and names it."""
    async with node(tmp_path) as n:
        (tmp_path / "store").write_text("")
        n.settings["store_dir"] = str(tmp_path / "store/here")
        n.write()
        assert await n.wait_ended(await n.spawn("--config", str(n.config))) == 2
        assert f"{tmp_path / 'store/here'} cannot be made" in n.log()
        assert "Traceback" not in n.log()


async def test_engine_that_is_not_installed(tmp_path: Path) -> None:
    """A node without llama-server says so with a hint, and does not list the engine."""
    async with node(tmp_path) as n:
        n.settings["engines"] = {"llamacpp": "/no/such/llama-server"}
        n.write()
        await n.start()
        hello = await n.connected(1)
        assert "llamacpp" not in hello.inventory.engines
        await n.head.command(ensure_copy(n.models), 1, DISK)
        await n.head.command(wire.EnsureReplica("chat-0", "chat", "org/m", "main", "disk", "llamacpp"), 2, REPLICA)
        error = await n.failed(REPLICA, 2)
        assert error.code == "engine_missing"
        assert "engines.llamacpp" in error.hint


async def test_files_lost_under_an_engine_are_fetched_again(tmp_path: Path) -> None:
    """The model's files vanish: the engine's next start finds that out, the copy is told as failed and why, RAM too;
    when the head orders it again it is fetched and the engine comes back by itself.
    """
    async with node(tmp_path) as n:
        await starts_with_a_copy(n)
        await n.head.command(ensure_copy(n.models, "dram"), 2, DRAM)
        await n.done(DRAM, 2)
        await n.head.command(ensure_replica(tmp_path), 3, REPLICA)
        ready = await n.done(REPLICA, 3)
        (lost,) = (tmp_path / "state/store/models/org/m@main").glob("*.gguf")
        blob = lost.resolve()
        lost.unlink()
        blob.unlink(missing_ok=True)
        for path in (tmp_path / "state/store").rglob("*"):
            if path.is_file() and path.stat().st_size == 3_000_000:
                path.unlink()
        os.kill(ready.detail["pid"], 9)
        await until(lambda: (c := copy_of(n.head.of(wire.Report), "disk")) and c.state == "failed", "the copy failed")
        found = copy_of(n.head.of(wire.Report), "disk")
        assert found is not None
        assert found.error is not None
        assert found.error.is_retryable
        await n.head.command(ensure_copy(n.models), 4, DISK)
        await n.done(DISK, 4)
        assert lost.stat().st_size == 3_000_000
        await until(lambda: (r := n.head.replica("chat-0")) and r.state == "ready", "the engine is back", timeout_s=30)
        again = n.head.replica("chat-0")
        assert again is not None
        assert again.pid != ready.detail["pid"]


def copy_of(reports: list[wire.Report], storage: str) -> wire.CopyStatus | None:
    """A copy as last reported."""
    found = [copy for copy in reports[-1].copies if copy.storage == storage] if reports else []
    return found[0] if found else None
