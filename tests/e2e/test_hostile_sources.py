"""Sources that lie, break and dawdle, against the whole cluster: a wrong byte never becomes a copy."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator

import pytest

from herder.types import JobView
from tests.doubles.hostile_http import Faults, HostileServer
from tests.e2e.cluster import Agent, Cluster, wait_dead
from tests.e2e.processes import until

MB = 1_000_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and the agent n1."""
    with Cluster(tmp_path_factory.mktemp("sources") / "cluster") as made:
        made.add_agent("n1")
        yield made


@pytest.fixture
def n1(cluster: Cluster) -> Agent:
    """The agent."""
    return cluster.agents["n1"]


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    """The source."""
    with HostileServer() as made:
        yield made


def begin(cluster: Cluster, server: HostileServer, name: str, size: int, **faults: object) -> tuple[bytes, JobView]:
    """Registers a model of one file at the source and starts its download to n1."""
    body = os.urandom(size)
    path = f"/{name}.bin"
    server.files[path] = body
    server.faults[path] = Faults(**faults)
    cluster.client.register_model(name, source=server.url + path)
    return body, cluster.client.download(name, "n1:disk")


def sent_of(server: HostileServer, cluster: Cluster, name: str, at_least: int) -> None:
    """Waits until the head has been told of so many bytes."""

    def enough() -> bool:
        copy = cluster.copy(name, "n1:disk")
        return copy is not None and copy.bytes_done >= at_least

    until(enough, f"{at_least} bytes of {name}")


def no_leftovers(agent: Agent, name: str) -> None:
    """Nothing of the model is published, and the private folders of the store are empty."""
    assert not agent.published(name).exists()
    until(lambda: not agent.parts(), "an empty part folder")


def test_mover_is_killed(cluster: Cluster, n1: Agent, server: HostileServer) -> None:
    """After kill -9 of the mover in the middle, a new one goes on from the last checkpoint, and every byte is right."""
    size = 40 * MB
    before = server.sent_bytes
    body, job = begin(cluster, server, "interrupted", size, rate=4 * MB)
    sent_of(server, cluster, "interrupted", 12 * MB)
    mover = n1.child("agent.mover")
    os.kill(mover, signal.SIGKILL)
    wait_dead(mover)
    cluster.client.wait_job(job, timeout_s=40)
    assert n1.child("agent.mover") != mover
    assert (n1.published("interrupted") / "interrupted.bin").read_bytes() == body
    assert server.sent_bytes - before < size * 1.6, "it began anew instead of going on"
    assert n1.parts() == []


def test_agent_is_killed_in_mid_download(cluster: Cluster, n1: Agent, server: HostileServer) -> None:
    """After kill -9 of the agent in mid-download the next one goes on, and the job completes by itself."""
    size = 40 * MB
    before = server.sent_bytes
    body, job = begin(cluster, server, "abandoned", size, rate=4 * MB)
    sent_of(server, cluster, "abandoned", 12 * MB)
    n1.kill()
    n1.start()
    done = cluster.client.wait_job(job, timeout_s=40)
    assert done.steps[0].attempts == 1
    assert (n1.published("abandoned") / "abandoned.bin").read_bytes() == body
    assert server.sent_bytes - before < size * 1.6


def test_a_source_that_dies_halfway(cluster: Cluster, n1: Agent, server: HostileServer) -> None:
    """A source that breaks off again and again, and then for a while answers 503, is gone on with from where it was."""
    faults = {"cut_after": 700_000, "cuts": 3, "status": 503, "statuses": 2, "retry_after": "0"}
    body, job = begin(cluster, server, "breaking", 6 * MB, **faults)
    cluster.client.wait_job(job, timeout_s=40)
    assert (n1.published("breaking") / "breaking.bin").read_bytes() == body
    assert (server.faults["/breaking.bin"].cuts, server.faults["/breaking.bin"].statuses) == (0, 0)


def test_a_server_that_ignores_ranges(cluster: Cluster, n1: Agent, server: HostileServer) -> None:
    """A server that answers every range with the whole file, and breaks off once, still gives a right copy."""
    faults = {"ignores_ranges": True, "cut_after": 2 * MB, "cuts": 1}
    body, job = begin(cluster, server, "rangeless", 5 * MB, **faults)
    cluster.client.wait_job(job, timeout_s=40)
    assert (n1.published("rangeless") / "rangeless.bin").read_bytes() == body


def test_a_directory_that_lies_about_a_digest(cluster: Cluster, n1: Agent, server: HostileServer) -> None:
    """A manifest whose sha256 is another's fails with digest_mismatch and leaves nothing behind."""
    body = os.urandom(2 * MB)
    rows = [{"path": "model.bin", "size": len(body), "sha256": hashlib.sha256(b"another").hexdigest()}]
    server.files["/lying/herder-manifest.json"] = json.dumps(rows).encode()
    server.files["/lying/model.bin"] = body
    cluster.client.register_model("lying", source=f"{server.url}/lying/")
    done = cluster.client.download("lying", "n1:disk", wait_s=40)
    assert (done.status, done.steps[0].error and done.steps[0].error.code) == ("failed", "digest_mismatch")
    no_leftovers(n1, "lying")
    assert cluster.client.model("lying").locations == ()


@pytest.mark.parametrize("claimed", [2 * MB - 1, 2 * MB + 1, 50 * MB])
def test_a_directory_that_lies_about_a_size(cluster: Cluster, n1: Agent, server: HostileServer, claimed: int) -> None:
    """A manifest whose size is not the file's fails as such and leaves nothing behind."""
    name = f"sized-{claimed}"
    server.files[f"/{name}/herder-manifest.json"] = json.dumps([{"path": "model.bin", "size": claimed}]).encode()
    server.files[f"/{name}/model.bin"] = os.urandom(2 * MB)
    cluster.client.register_model(name, source=f"{server.url}/{name}/")
    done = cluster.client.download(name, "n1:disk", wait_s=60)
    assert done.status == "failed"
    assert done.steps[0].error is not None
    assert done.steps[0].error.code in ("size_mismatch", "source_failed"), done.steps[0].error
    no_leftovers(n1, name)


@pytest.mark.parametrize("path", ["../../escaped.bin", "/escaped.bin", "a/../../escaped.bin"])
def test_a_directory_with_a_path_that_leaves_it(cluster: Cluster, n1: Agent, server: HostileServer, path: str) -> None:
    """A manifest that names a path outside its model is refused with invalid_path; the file comes to be nowhere."""
    name = f"escaping-{path.count('.')}-{path.count('/')}"
    server.files[f"/{name}/herder-manifest.json"] = json.dumps([{"path": path, "size": 6}]).encode()
    server.files["/escaped.bin"] = b"escape"
    cluster.client.register_model(name, source=f"{server.url}/{name}/")
    done = cluster.client.download(name, "n1:disk", wait_s=40)
    assert (done.status, done.steps[0].error and done.steps[0].error.code) == ("failed", "invalid_path")
    assert not list(cluster.folder.rglob("escaped.bin"))
    no_leftovers(n1, name)


def test_cancel_stops_a_download(cluster: Cluster, n1: Agent, server: HostileServer) -> None:
    """Cancelling a job ends the transfer itself: the source is read no more, and nothing stays on the disk."""
    _, job = begin(cluster, server, "unwanted", 60 * MB, rate=MB)
    sent_of(server, cluster, "unwanted", 2 * MB)
    done = cluster.client.cancel_job(job.id, wait_s=20)
    assert (done.status, done.steps[0].state) == ("cancelled", "cancelled")
    no_leftovers(n1, "unwanted")

    def is_quiet() -> bool:
        before = server.sent_bytes
        time.sleep(0.5)  # the length of the silence is what is tested: at 1 MB/s ten pieces would have been sent
        return server.sent_bytes == before

    until(is_quiet, "a source that nobody reads")
    assert cluster.copy("unwanted", "n1:disk") is None
    assert cluster.client.model("unwanted").locations == ()


def test_a_source_that_changes_on_the_way(cluster: Cluster, n1: Agent, server: HostileServer) -> None:
    """A file that becomes another one meanwhile is never a mixture of both."""
    changed = os.urandom(6 * MB)
    _, job = begin(
        cluster, server, "changing", 6 * MB, rate=3 * MB, cut_after=MB, cuts=2, change_after=2, changed=changed
    )
    done = until(lambda: cluster.client.job(job.id) if cluster.client.job(job.id).ended_ms else None, "the job's end")
    target = n1.published("changing") / "changing.bin"
    if done.status == "completed":
        assert target.read_bytes() == changed
    else:
        no_leftovers(n1, "changing")
