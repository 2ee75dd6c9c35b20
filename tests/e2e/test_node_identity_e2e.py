"""Whose a node id is, with real daemons: an impostor with the join token, and a machine that lost its state."""

from __future__ import annotations

from tests.e2e.cluster import Cluster

REFUSED = "is known under another secret"


def test_an_impostor_is_refused_until_an_admin_says_otherwise(fresh: Cluster) -> None:
    """With the same token and node id, but without the node's secret: no session, an alarm, and the node goes on."""
    first = fresh.add_agent("n1")
    fresh.wait_node("n1")
    secret = first.state / "identity"
    assert secret.stat().st_mode & 0o077 == 0
    assert secret.read_text().strip() not in first.log()
    first.stop()
    kept = secret.read_bytes()
    secret.unlink()  # what follows is another machine that holds the token, or this one after a loss

    first.begin()
    first.wait_logged(REFUSED)
    assert first.sessions() == 1
    assert any(alarm.startswith("wrong_identity:n1") for alarm in fresh.client.health().alarms)
    assert "the node is suspect" in fresh.client.why("node", "n1").reason
    first.stop()

    secret.write_bytes(kept)  # the real one is back
    first.start()
    fresh.wait_node("n1")
    assert not any(alarm.startswith("wrong_identity") for alarm in fresh.client.health().alarms)
    first.stop()

    secret.unlink()
    done = fresh.cli("nodes", "reset-identity", "n1")
    assert done.returncode == 0, done.stderr
    first.start()
    fresh.wait_node("n1")


def test_a_key_for_one_node_is_for_no_other(fresh: Cluster) -> None:
    """`herder keys create --node`: its agent joins, another with the same token does not."""
    token = fresh.folder / "n1.token"
    done = fresh.cli("keys", "create", "--role", "agent", "--node", "n1", "--file", str(token), "for-n1")
    assert done.returncode == 0, done.stderr
    fresh.add_agent("n1", token_file=str(token))
    fresh.wait_node("n1")
    other = fresh.add_agent("n2", is_started=False, token_file=str(token))
    other.begin()
    other.wait_logged("the key of this agent is for another node")
    assert [node.node_id for node in fresh.client.nodes()] == ["n1"]
