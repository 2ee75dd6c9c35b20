"""How many connections are let in, and how much memory request bodies may take."""

from __future__ import annotations

import pytest

from common import limits
from common.errors import BodyTooLarge, GatewayFull
from head.addresses import network
from head.config import DoorConfig
from head.crowd import Crowd
from head.gateway.bodies import Body, Room

HOSTS = [f"10.0.0.{number}" for number in range(1, 10)]


def test_there_is_a_most_in_all() -> None:
    """One more is refused until somebody leaves; who was refused does not count."""
    crowd = Crowd(DoorConfig(connections_max=4, connections_per_address_max=2))
    assert [crowd.enter(host) for host in HOSTS[:5]] == [True] * 4 + [False]
    assert crowd.refused == {"total": 1}
    crowd.leave(HOSTS[0])
    assert crowd.enter(HOSTS[4])
    assert crowd.count == 4


def test_one_address_cannot_take_all() -> None:
    """Others get in while one address is at its limit; neighbours in an IPv6 /64 count together."""
    crowd = Crowd(DoorConfig(connections_max=100, connections_per_address_max=2))
    assert [crowd.enter(HOSTS[0]) for _ in range(3)] == [True, True, False]
    assert crowd.enter(HOSTS[1])
    assert [crowd.enter(f"2001:db8::{number}") for number in (1, 2, 3)] == [True, True, False]
    assert crowd.enter("2001:db8:0:1::1")
    assert crowd.refused == {"address": 2}
    crowd.leave(HOSTS[0])
    assert crowd.enter(HOSTS[0])
    for host in (HOSTS[0], HOSTS[0], HOSTS[1], "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"):
        crowd.leave(host)
    assert (crowd.count, dict(crowd._by_network)) == (0, {})


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1"])
def test_this_machine_counts_in_all_only(address: str) -> None:
    """A proxy or a thousand agents on the head's own machine are not one greedy client."""
    crowd = Crowd(DoorConfig(connections_max=5, connections_per_address_max=1))
    assert [crowd.enter(address) for _ in range(6)] == [True] * 5 + [False]
    for _ in range(5):
        crowd.leave(address)
    assert crowd.count == 0


def test_the_defaults_follow_the_descriptors() -> None:
    """Two thirds of them may be connections, half of those from one address; never so few that nobody gets in."""
    crowd = Crowd(DoorConfig(), descriptors=64 + 30_000)
    assert (crowd.max, crowd.per_address_max) == (20_000, 10_000)
    assert Crowd(DoorConfig(), descriptors=20).max == 16
    assert Crowd(DoorConfig(connections_max=10, connections_per_address_max=50)).per_address_max == 10


def test_an_address_is_known_by_its_network() -> None:
    """IPv4 by itself, also inside IPv6; IPv6 by its /64; what is none as unknown."""
    found = [network(text) for text in ("10.0.0.1", "::ffff:10.0.0.1", "2001:db8::1%eth0", "", None, "nonsense")]
    assert found == ["10.0.0.1", "10.0.0.1", "2001:db8::", "unknown", "unknown", "unknown"]


def test_bodies_share_their_room() -> None:
    """What has come counts, at once; what is dropped is free again, once."""
    room = Room(100)
    one, other = Body(room), Body(room)
    one.grow(60)
    other.grow(40)
    with pytest.raises(GatewayFull) as refused:
        other.grow(1)
    assert refused.value.details["retry_after_s"] >= 1
    assert room.held == 100
    one.drop()
    one.drop()
    assert room.held == 40
    other.grow(60)
    other.fill(b"x" * 100)
    other.drop()
    assert (room.held, other.data) == (0, b"")


def test_one_body_has_its_own_limit() -> None:
    """However much room there is; the bytes of the refused piece are not counted."""
    room = Room(10 * limits.GATEWAY_BODY_BYTES)
    body = Body(room)
    body.grow(limits.GATEWAY_BODY_BYTES)
    with pytest.raises(BodyTooLarge):
        body.grow(1)
    body.drop()
    assert room.held == 0
