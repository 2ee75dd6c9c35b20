"""A node is booted: everything on it is gone, and its agent comes up under another boot id.

The boot is played with real processes: all of the node's are killed at once, and the agent is started in a mount
namespace of its own, in which another file lies over /proc/sys/kernel/random/boot_id.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.e2e.cluster import FAST, Cluster
from tests.e2e.processes import end_all, is_alive, until

BOOT_ID = "/proc/sys/kernel/random/boot_id"
MOUNT = f'mount --bind "$0" {BOOT_ID} && exec "$@"'


def under_boot_id(path: Path) -> list[str]:
    """A prefix under which a program reads its boot id from the file. Skips the test where that is refused."""
    path.write_text(f"{uuid.uuid4()}\n")
    prefix = ["unshare", "--mount", "sh", "-c", MOUNT, str(path)]
    tried = subprocess.run([*prefix, "cat", BOOT_ID], capture_output=True, text=True, timeout=20, check=False)
    if tried.stdout != path.read_text():
        pytest.skip(f"no mount over {BOOT_ID} here, for which root is needed: {tried.stderr.strip()[:200]}")
    return prefix


def test_a_node_is_booted(tmp_path: Path) -> None:
    """The head knows at once: engine and RAM copy are made anew, the disk copy is kept, and the boot is the reason."""
    prefix = under_boot_id(tmp_path / "next_boot")
    with Cluster(tmp_path / "cluster", limits=FAST) as cluster:
        n1 = cluster.add_agent("n1")
        before = cluster.serve_tiny("chat", "n1", storage="dram")
        revision = max(line.revision for line in cluster.client.story("n1"))
        held = n1.child("agent.holder")
        fetched = (n1.published("chat") / "chat.bin").stat()
        end_all(n1.folder)
        n1.wait_ended()
        n1.prefix = prefix
        n1.start()
        after = cluster.wait_replica("chat", lambda view: view.state == "ready" and view.pid != before.pid)
        assert (after.replica, after.node) == (before.replica, "n1")
        assert after.generation > before.generation
        assert not is_alive(before.pid)
        assert cluster.chat("chat") == "w0 w1 w2 "
        assert cluster.wait_copy("chat", "n1:dram", "ready").is_locked == (os.geteuid() == 0)
        assert n1.child("agent.holder") != held
        kept = (n1.published("chat") / "chat.bin").stat()
        assert (kept.st_ino, kept.st_mtime_ns) == (fetched.st_ino, fetched.st_mtime_ns)
        lost = [line for line in cluster.client.story(before.replica) if line.what == "replica_lost"]
        assert [line.detail["reason"] for line in lost] == ["the node was booted"]
        assert all(line.what != "node_unreachable" for line in cluster.client.story("n1") if line.revision > revision)
        # nothing of the boot before is believed twice: the next agent on this boot finds its engine again
        n1.kill()
        n1.start()
        again = cluster.wait_replica("chat", lambda view: view.state == "ready")
        assert (again.pid, again.restarts) == (after.pid, after.restarts)
        until(lambda: cluster.chat("chat") == "w0 w1 w2 ", "an answer")
