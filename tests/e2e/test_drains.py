"""Engines stopped under real streams: those that end in time are whole, those that do not are cut with a reason."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.cluster import Cluster, code_of
from tests.e2e.processes import is_alive, until

DRAIN_MS = 4_000
WORDS_PER_S = 20  # of tests/e2e/tiny_engine.py


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that gives requests DRAIN_MS to end, and one agent."""
    with Cluster(tmp_path_factory.mktemp("drains") / "cluster", limits={"DRAIN_MS": DRAIN_MS}) as made:
        made.add_agent("n1")
        yield made


@contextmanager
def events_of(cluster: Cluster, model: str, words: int) -> Iterator[Iterator[bytes]]:
    """The events of a streamed chat, as they come; the last is [DONE] or an error."""
    body = json.dumps({"model": model, "stream": True, "max_tokens": words, "messages": []}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {cluster.head.token()}"}
    request = urllib.request.Request(f"{cluster.head.url}/v1/chat/completions", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        yield (line[6:].strip() for line in answer if line.startswith(b"data: "))


def test_a_stream_ends_before_its_engine_is_stopped(cluster: Cluster) -> None:
    """Every word arrives; meanwhile new requests are refused with a code, and the engine lives."""
    replica = cluster.serve_tiny("brief", "n1")
    words = WORDS_PER_S * DRAIN_MS // 1000 // 2
    with events_of(cluster, "brief", words) as events:
        next(events)
        cluster.client.delete_service("brief")
        assert cluster.client.service("brief").replicas[0].state == "draining"
        assert "draining" in cluster.client.why("replica", replica.replica).reason
        assert code_of(lambda: cluster.chat("brief")) == "no_replica_ready"
        rest = list(events)
        assert (len(rest), rest[-1]) == (words, b"[DONE]")
    until(lambda: not is_alive(replica.pid), "an engine that has ended")
    until(lambda: code_of(lambda: cluster.service("brief")) == "service_not_found", "a service that is gone")
    story = [line.what for line in cluster.client.story(replica.replica)]
    assert story.index("replica_stopping") < story.index("replica_stopped")


def test_a_stream_that_lasts_too_long_is_cut(cluster: Cluster) -> None:
    """At the deadline the stream's last event says why, and the engine ends."""
    replica = cluster.serve_tiny("endless", "n1")
    with events_of(cluster, "endless", 10_000) as events:
        next(events)
        cluster.client.delete_service("endless")
        last = list(events)[-1]
    assert json.loads(last)["error"]["code"] == "engine_stopped"
    until(lambda: not is_alive(replica.pid), "an engine that has ended")


def test_a_node_drains_within_its_deadline(cluster: Cluster) -> None:
    """An engine that cannot move finishes its stream in the last part of the node's time."""
    replica = cluster.serve_tiny("bound", "n1")
    with events_of(cluster, "bound", WORDS_PER_S) as events:
        next(events)
        cluster.client.drain("n1", deadline_s=8)
        assert list(events)[-1] == b"[DONE]"
    assert is_alive(replica.pid)
    until(lambda: cluster.client.node("n1").drain == "drained", "a drained node")
    assert not is_alive(replica.pid)
    cluster.client.uncordon("n1")
    cluster.wait_replica("bound", lambda view: view.state == "ready")
    cluster.client.delete_service("bound")


def test_a_head_that_starts_again_ends_the_drain(cluster: Cluster) -> None:
    """The streams went with the old head: the engine is stopped as soon as its agent is back."""
    replica = cluster.serve_tiny("orphan", "n1")
    with events_of(cluster, "orphan", 10_000) as events:
        next(events)
        cluster.client.delete_service("orphan")
        assert cluster.service("orphan").replicas[0].state == "draining"
        cluster.head.kill()
        cluster.head.start()
    assert cluster.service("orphan").replicas[0].state == "stopping"
    until(lambda: not is_alive(replica.pid), "an engine that has ended")
    until(lambda: code_of(lambda: cluster.service("orphan")) == "service_not_found", "a service that is gone")
