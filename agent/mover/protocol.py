"""What the agent and its mover say to each other over a socketpair: length-prefixed msgpack frames.

The mover owns the store: its files, its catalogue (`state.db`), its reservations. The agent asks by `Request`
objects; each is answered by any number of `Moving` frames and exactly one `Done`. `token` is chosen by the agent
and is unique among open requests. If the mover dies, the agent starts a new one and asks again: every fetch resumes
from
its bitmap, every other request is idempotent. Frames: 4-byte little-endian length, then msgpack.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from common.errors import ErrorInfo
from common.manifest import Manifest
from common.wire import Source

FRAME_BYTES = 16 * 1024 * 1024
LENGTH = struct.Struct("<I")


class Request(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """Root of what the agent asks."""

    token: str


class Fetch(Request, frozen=True, tag="fetch"):
    """Bring a model to the disk store: reserve, fetch, verify, sync, publish. Done.manifest is the result.

    With a manifest, sources are checked against it; without one it is made (and `model`, `revision` go into it).
    """

    model: str
    revision: str
    sources: tuple[Source, ...]
    manifest: Manifest | None = None


class Drop(Request, frozen=True, tag="drop"):
    """Remove the disk copy: unpublished at once, bytes freed in the background. Absent already: ok."""

    model: str
    revision: str


class Verify(Request, frozen=True, tag="verify"):
    """Re-hash a disk copy; Done.error digest_mismatch names the bad files, which are quarantined."""

    model: str
    revision: str


class Scan(Request, frozen=True, tag="scan"):
    """What the store holds: Done.copies."""


class Capacity(Request, frozen=True, tag="capacity"):
    """Done.detail: total_bytes, free_bytes, used_bytes, reserved_bytes, reclaiming_bytes."""


class Cancel(Request, frozen=True, tag="cancel"):
    """Stop another request; that one's Done says `cancelled`. Part files of a fetch are kept for resume unless
    `discard`."""

    target: str
    discard: bool = True


class Configure(Request, frozen=True, tag="configure"):
    """This node's ticket key (base64) and its id; sent after each welcome."""

    node_id: str
    ticket_key: str
    cluster_id: str = ""


class Stop(Request, frozen=True, tag="stop"):
    """End: stop serving and fetching at checkpoints, close the catalogue."""


AnyRequest = Fetch | Drop | Verify | Scan | Capacity | Cancel | Configure | Stop


class HeldCopy(msgspec.Struct, frozen=True, omit_defaults=True):
    """A published copy: `directory` is what engines open."""

    model: str
    revision: str
    directory: str
    size_bytes: int
    digest: str
    format: str
    detected: dict[str, Any] = {}
    manifest: Manifest | None = None


class Answer(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """Root of what the mover answers."""

    token: str


class Ready(Answer, frozen=True, tag="ready"):
    """First frame of a mover (token empty): where its blob server listens."""

    host: str = ""
    port: int = 0
    pid: int = 0


class Moving(Answer, frozen=True, tag="moving"):
    """Progress, at most five times a second. state: reserved | fetching | verifying | syncing | dropping."""

    state: str
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bytes_per_s: float = 0.0
    source: str = ""


class Done(Answer, frozen=True, tag="done"):
    """The end of a request; `error` None means success."""

    error: ErrorInfo | None = None
    manifest: Manifest | None = None
    copies: tuple[HeldCopy, ...] = ()
    detail: dict[str, Any] = {}


AnyAnswer = Ready | Moving | Done

encoder = msgspec.msgpack.Encoder()
requests = msgspec.msgpack.Decoder(AnyRequest)
answers = msgspec.msgpack.Decoder(AnyAnswer)


def frame(message: Request | Answer) -> bytes:
    """The message with its length in front."""
    body = encoder.encode(message)
    return LENGTH.pack(len(body)) + body
