"""What the agent and the holder of the RAM tier say to each other: the mover's framing over a unix socket.

The holder keeps models resident and locked in RAM. It is started by the agent, outlives it, and listens on a
0600 unix socket in a 0700 directory; a new agent connects to the running one and asks `List`. Every request is
answered by any number of `Moving` frames and exactly one `Done`, which always carries all present holdings.
Requests of one connection may overlap: `token` is chosen by the agent and is unique among its open ones.

`key` names a holding and is the agent's choice (it uses "name@revision"). Holding a key again with the same
directory and paths answers at once when everything is still resident, else populates what is missing.
Frames: 4-byte little-endian length, then msgpack; the first frame of every connection is `Ready`.

A closed connection ends nothing: holdings stay, and a `Hold` in progress goes on (ask `List`, or hold again to
follow it). `Cancel` stops a `Hold` in progress; `Release` of a key that is being populated stops it too.
"""

from __future__ import annotations

import msgspec

from agent.mover.protocol import FRAME_BYTES, LENGTH
from common.errors import ErrorInfo

__all__ = ["FRAME_BYTES", "LENGTH"]


class Request(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """Root of what the agent asks."""

    token: str


class Hold(Request, frozen=True, tag="hold"):
    """Make these files resident and lock them. `paths` are relative to `directory`; empty: every file below it.

    Done.error: memory_full {need, free, budget, used}, not_found, cancelled.
    """

    key: str
    directory: str
    paths: tuple[str, ...] = ()


class Release(Request, frozen=True, tag="release"):
    """Unlock and unmap. A key that is not held: ok."""

    key: str


class List(Request, frozen=True, tag="list"):
    """What is held, with residency counted now by mincore."""


class Cancel(Request, frozen=True, tag="cancel"):
    """Stop a `Hold` of this connection; that one's Done says `cancelled`."""

    target: str


class Stop(Request, frozen=True, tag="stop"):
    """Release everything and end."""


AnyRequest = Hold | Release | List | Cancel | Stop


class Holding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One holding. `resident` is the resident bytes by mincore (page granular, at most `bytes`).

    `is_complete`: populated once to the end. `is_locked` False: resident but the kernel may evict it (no
    permission to lock so much memory); the holder then looks again every 30 s and reads back what is missing.
    `directory` is what engines open: the source directory, or the tmpfs copy in `--tmpfs` mode.
    """

    key: str
    directory: str
    bytes: int
    resident: int
    is_locked: bool
    is_complete: bool = True


class Answer(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """Root of what the holder answers."""

    token: str


class Ready(Answer, frozen=True, tag="ready"):
    """First frame of a connection (token empty). `why_unlocked`: why memory cannot be locked, empty if it can."""

    pid: int = 0
    budget_bytes: int = 0
    why_unlocked: str = ""
    mode: str = "cache"  # "cache": pages of the disk files; "tmpfs": copies


class Moving(Answer, frozen=True, tag="moving"):
    """Progress of a `Hold`, at most five times a second. state: loading."""

    state: str = "loading"
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bytes_per_s: float = 0.0


class Done(Answer, frozen=True, tag="done"):
    """The end of a request; `error` None means success."""

    error: ErrorInfo | None = None
    holdings: tuple[Holding, ...] = ()
    used_bytes: int = 0
    budget_bytes: int = 0


AnyAnswer = Ready | Moving | Done

encoder = msgspec.msgpack.Encoder()
requests = msgspec.msgpack.Decoder(AnyRequest)
answers = msgspec.msgpack.Decoder(AnyAnswer)


def frame(message: Request | Answer) -> bytes:
    """The message with its length in front."""
    body = encoder.encode(message)
    return LENGTH.pack(len(body)) + body
