"""Disks that are really full, at the head and at the agent: small tmpfs mounts, filled to the last byte."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.doubles.hostile_http import Faults, HostileServer
from tests.e2e.cluster import Agent, Cluster, code_of
from tests.e2e.processes import is_alive, until

MB = 1_000_000
STORE_BYTES = 24 << 20


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own at a folder, so large."""
    folder.mkdir(parents=True)
    options = f"size={size},mode=0700"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "herder-test", folder], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


def fill(folder: Path) -> Path:
    """Takes all space that is left below a folder; unlink the file to give it back."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file:
        for piece in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(b"\0" * piece)
            except OSError:
                continue  # full for pieces of this size
    return path


@pytest.fixture
def disks() -> Iterator[Callable[[Path, int], Path]]:
    """Makes small disks, unmounted after the test."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    with ExitStack() as stack:
        yield lambda folder, size: stack.enter_context(small_disk(folder, size))


def test_full_disk_at_the_head(tmp_path: Path, disks: Callable[[Path, int], Path]) -> None:
    """Changes answer 507, reads, leases, requests and engines go on, nobody is lost; with room again, all is back."""
    cluster = Cluster(tmp_path / "cluster")
    disk = disks(cluster.head.state, 16 << 20)
    with cluster:
        cluster.add_agent("n1")
        replica = cluster.serve_tiny("chat", "n1")
        filler = fill(disk)

        def is_refused() -> bool:
            status, answer = cluster.head.call(
                "POST", "/api/v1/models", {"name": "refused", "metadata": {"x": "y" * 9_000}}
            )
            if status == 201:  # the last page of the journal had room for it
                cluster.head.call("DELETE", "/api/v1/models/refused")
                return False
            assert (status, answer["error"]["code"]) == (507, "state_read_only")
            return True

        until(is_refused, "a change that is refused")
        health = cluster.client.health()
        assert (health.status, health.is_read_only) == ("degraded", True)
        assert cluster.head.call("GET", "/api/v1/models/refused")[0] == 404
        assert cluster.client.model("chat").name == "chat"
        assert cluster.chat("chat") == "w0 w1 w2 "
        seen = cluster.client.node("n1").last_seen_ms or 0
        until(lambda: (cluster.client.node("n1").last_seen_ms or 0) > seen, "leases while the disk is full")
        assert is_alive(replica.pid)
        filler.unlink()
        until(lambda: not cluster.client.health().is_read_only, "a head that can write again")
        cluster.client.register_model("welcome")
        after = cluster.wait_replica("chat", lambda view: view.state == "ready")
        assert (after.pid, after.restarts) == (replica.pid, 0)
        cluster.head.kill()
        cluster.head.start()
        assert cluster.client.model("welcome").name == "welcome"
        assert code_of(lambda: cluster.client.model("refused")) == "model_not_found"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and the agent n1, whose store is a small disk."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path_factory.mktemp("disks")
    with small_disk(folder / "store", STORE_BYTES) as store, Cluster(folder / "cluster") as made:
        made.add_agent("n1", store_dir=str(store))
        made.agents["n1"].store = store
        yield made


@pytest.fixture
def n1(cluster: Cluster) -> Agent:
    """The agent."""
    return cluster.agents["n1"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opens and does not close itself."""
    with ExitStack() as made:
        yield made


def test_a_model_that_is_too_large(cluster: Cluster, n1: Agent) -> None:
    """It is refused with numbers before the first byte, and nothing of it stays."""
    cluster.make_model("huge", 60 * MB)
    done = cluster.client.download("huge", "n1:disk", wait_s=30)
    assert done.status == "failed"
    error = done.steps[0].error
    assert error is not None
    assert error.code == "disk_full"
    assert any(isinstance(value, int) and value >= 60 * MB for value in error.details.values()), error
    assert n1.parts() == []
    assert list(n1.store.glob("blobs/*/*")) == []


def test_a_disk_that_others_filled(cluster: Cluster, n1: Agent) -> None:
    """When others take the space, a download that fitted by the books is disk_full; with room again it succeeds."""
    cluster.make_model("squeezed", 8 * MB)
    filler = fill(n1.store)
    done = cluster.client.download("squeezed", "n1:disk", wait_s=30)
    assert done.status == "failed"
    assert done.steps[0].error is not None
    assert done.steps[0].error.code == "disk_full"
    filler.unlink()
    assert n1.parts() == []
    cluster.download("squeezed", "n1")
    assert (n1.published("squeezed") / "squeezed.bin").stat().st_size == 8 * MB


def test_a_disk_that_fills_on_the_way(cluster: Cluster, n1: Agent) -> None:
    """A source that says no size and gives more than there is room for ends as disk_full, without partial files."""
    with HostileServer({"/endless.bin": os.urandom(40 * MB)}) as server:
        server.faults["/endless.bin"] = Faults(chunked=True, ignores_ranges=True)
        cluster.client.register_model("endless", source=f"{server.url}/endless.bin")
        done = cluster.client.download("endless", "n1:disk", wait_s=60)
    assert done.status == "failed"
    assert done.steps[0].error is not None
    assert done.steps[0].error.code == "disk_full"
    until(lambda: not n1.parts(), "an empty part folder")
    assert not n1.published("endless").exists()


def test_pinned_copies_are_never_evicted(cluster: Cluster, n1: Agent, stack: ExitStack) -> None:
    """Room is made by dropping what can be fetched again; with that pinned, the newcomer is refused."""
    for model in cluster.client.models():
        for device in model.locations:
            cluster.client.delete_copy(model.name, device, wait_s=20)
    stack.enter_context(server := HostileServer({"/keep.bin": os.urandom(12 * MB)}))
    cluster.make_model("keep", source=f"{server.url}/keep.bin")
    cluster.download("keep", "n1")
    cluster.client.pin("keep", "n1:disk", name="test")
    cluster.make_model("newcomer", 14 * MB)
    refused = cluster.client.download("newcomer", "n1:disk", wait_s=30)
    assert refused.status == "failed"
    assert refused.steps[0].error is not None
    assert refused.steps[0].error.code == "disk_full"
    assert cluster.wait_copy("keep", "n1:disk", "ready").pins == ("test",)
    cluster.client.unpin("keep", "n1:disk", name="test")
    cluster.download("newcomer", "n1")
    assert cluster.client.model("keep").locations == ()
    until(lambda: not n1.parts(), "an empty part folder")
