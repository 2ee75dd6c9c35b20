"""Transfer tickets: the head lets one node read one model from another node, for a while.

The head derives a key per node from a secret that lives as long as the head process; the node learns its key in
`Welcome`. A ticket is `payload.mac`: the payload names cluster, serving node, model digest and expiry, the mac is
BLAKE3 keyed with the serving node's key. Expiry is counted in the *serving node's* CLOCK_BOOTTIME (the head
knows the offset from that node's leases), so no two clocks have to agree.
"""

from __future__ import annotations

import base64
import hmac

import msgspec
from blake3 import blake3

from common.errors import Forbidden
from herder.decoding import UNREADABLE


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """What a ticket says. `digest` is the manifest digest; `until_boottime_ms` is the serving node's clock."""

    cluster_id: str
    serving_node: str
    reading_node: str
    digest: str
    until_boottime_ms: int


_decoder = msgspec.json.Decoder(Ticket)


def node_key(secret: bytes, node_id: str) -> bytes:
    """The node's 32-byte key. `secret`: 32 bytes."""
    return blake3(node_id.encode(), key=secret).digest()


def issue(ticket: Ticket, key: bytes) -> str:
    """The ticket as it travels in the `X-Herder-Ticket` header."""
    payload = base64.urlsafe_b64encode(msgspec.json.encode(ticket))
    return f"{payload.decode()}.{blake3(payload, key=key).hexdigest()}"


def check(text: str, key: bytes, *, node_id: str, now_boottime_ms: int) -> Ticket:
    """The ticket, if this node's key signed it, it names this node and it has not ended. Raises: Forbidden."""
    payload, _, mac = text.partition(".")
    if not hmac.compare_digest(blake3(payload.encode(), key=key).hexdigest(), mac):
        raise Forbidden("the transfer ticket is not valid here")
    try:
        ticket = _decoder.decode(base64.urlsafe_b64decode(payload))
    except (ValueError, *UNREADABLE):
        raise Forbidden("the transfer ticket cannot be read") from None
    if ticket.serving_node != node_id or ticket.until_boottime_ms < now_boottime_ms:
        raise Forbidden("the transfer ticket is for another node or has ended")
    return ticket
