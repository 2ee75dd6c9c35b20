"""Two nodes: bytes go from one to the other by ticket, and a drained node hands its services over."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from herder.types import CreateService
from tests.e2e.cluster import Cluster, code_of
from tests.e2e.processes import is_alive, until

MB = 1_000_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and the agents n1 and n2."""
    with Cluster(tmp_path_factory.mktemp("nodes") / "cluster") as made:
        agents = [made.add_agent(node, is_started=False) for node in ("n1", "n2")]
        for agent in agents:
            agent.begin()
        for agent in agents:
            made.wait_node(agent.node)
        yield made


def test_copy_from_node_to_node(cluster: Cluster) -> None:
    """With the origin gone, a copy comes whole from the other node, and the model keeps its digests."""
    origin = cluster.make_model("org/shared", 24 * MB)
    digest = hashlib.sha256(origin.read_bytes()).hexdigest()
    cluster.download("org/shared", "n1")
    origin.unlink()
    cluster.client.wait_job(cluster.client.copy("org/shared", "n2:disk"), timeout_s=40)
    target = cluster.agents["n2"].published("org/shared") / origin.name
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    assert set(cluster.client.model("org/shared").locations) == {"n1:disk", "n2:disk"}
    copy = cluster.wait_copy("org/shared", "n2:disk", "ready")
    assert copy.bytes_done == copy.bytes_total == 24 * MB


def test_bytes_only_for_tickets(cluster: Cluster) -> None:
    """The door between nodes answers 403 without a ticket and with a wrong one, also for a blob that it has."""
    n1 = cluster.agents["n1"]
    cluster.make_model("guarded", 50_000)
    cluster.download("guarded", "n1")
    mover = psutil.Process(n1.child("agent.mover"))
    ports = [link.laddr.port for link in mover.net_connections("tcp") if link.status == psutil.CONN_LISTEN]
    blob = next(path.name for path in n1.store.glob("blobs/*/*"))
    for path in (f"/blobs/{blob}", f"/chunks/{blob}", "/manifest", "/../../etc/passwd"):
        for headers in ({}, {"Herder-Ticket": "e30.AAAA"}, {"Authorization": f"Bearer {cluster.head.token()}"}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{ports[0]}{path}", headers=headers))
            assert refused.value.code in (400, 403, 404), path
            refused.value.close()


def test_the_other_node_dies_in_mid_copy(cluster: Cluster) -> None:
    """When the serving node's mover is killed in the middle, the copy waits for the next one and is whole."""
    origin = cluster.make_model("org/large", 200 * MB)
    cluster.download("org/large", "n1")
    body = hashlib.sha256(origin.read_bytes()).hexdigest()
    origin.unlink()
    mover = psutil.Process(cluster.agents["n1"].child("agent.mover"))
    job = cluster.client.copy("org/large", "n2:disk")
    until(lambda: cluster.agents["n2"].parts(), "bytes on their way")
    mover.kill()
    cluster.client.wait_job(job, timeout_s=60)
    target = cluster.agents["n2"].published("org/large") / origin.name
    assert hashlib.sha256(target.read_bytes()).hexdigest() == body
    assert code_of(lambda: cluster.client.delete_model("org/large")) == ""


def test_drain_moves_a_service(cluster: Cluster) -> None:
    """A drained node's service is ready on the other node before its engine is stopped: no new request is refused.

    Nor is one cut off that is being answered by the engine that goes.
    """
    cluster.make_model("mobile", 50_000)
    cluster.client.create_service(CreateService(name="mobile", model="mobile", recipe="tiny"))
    before = cluster.wait_replica("mobile", lambda view: view.state == "ready")
    other = ({"n1", "n2"} - {before.node}).pop()
    cluster.client.drain(before.node, deadline_s=60, reason="test")

    codes: list[str] = []

    def has_moved() -> bool:
        codes.append(code_of(lambda: cluster.chat("mobile")))
        return cluster.client.node(before.node).drain == "drained"

    until(has_moved, "a drained node")
    assert not [code for code in codes if code], codes
    after = cluster.wait_replica("mobile", lambda view: view.state == "ready")
    assert (after.node, is_alive(before.pid)) == (other, False)
    assert cluster.chat("mobile") == "w0 w1 w2 "
    waiting = cluster.client.serve("org/shared", f"{before.node}:disk", config={"recipe": "tiny", "name": "late"})
    until(lambda: "drained" in cluster.client.job(waiting.id).steps[0].note, "a step that says why it waits")
    assert cluster.client.replicas(service="late").all() == []
    cluster.client.cancel_job(waiting.id, wait_s=10)
    cluster.head.kill()
    cluster.head.start()
    assert cluster.client.node(before.node).drain == "drained"
    cluster.client.uncordon(before.node)
    node = cluster.wait_node(before.node)
    assert (node.drain, node.is_cordoned) == ("", False)


def test_drain_with_a_deadline(cluster: Cluster) -> None:
    """A service that is bound to the drained node keeps its engine until the deadline, and is stopped then."""
    replica = cluster.serve_tiny("bound", "n2")
    cluster.client.drain("n2", deadline_s=2)
    assert cluster.client.node("n2").drain == "draining"
    assert is_alive(replica.pid)
    until(lambda: cluster.client.node("n2").drain == "drained", "a drained node")
    assert not is_alive(replica.pid)
    cluster.client.uncordon("n2")
    back = cluster.wait_replica("bound", lambda view: view.state == "ready")
    assert back.pid != replica.pid
