"""The planner as a process of its own: questions in, answers out, one after the other, over stdin and stdout.

A search computes for a second; in the head's process it would hold up heartbeats. Frames are a 4-byte length (big
endian) and JSON: `Asked` in, `Answered` out. The process ends with its stdin.
"""

from __future__ import annotations

import struct
import sys
from typing import BinaryIO

import msgspec

from common.errors import ErrorInfo, HerderError, Internal
from head.planner.endpoints.base import ask
from head.planner.endpoints.questions import Desk
from head.planner.endpoints.table import BY_PATH

LENGTH = struct.Struct(">I")
FRAME_BYTES = 64 << 20


class Asked(msgspec.Struct, frozen=True):
    """One question."""

    path: str
    body: msgspec.Raw
    desk: Desk


class Answered(msgspec.Struct, frozen=True, omit_defaults=True):
    """Its answer, or what was wrong; `status` is the HTTP status of an error."""

    answer: msgspec.Raw = msgspec.Raw(b"null")
    error: ErrorInfo | None = None
    status: int = 200


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answers until the source ends."""
    decoder, encoder = msgspec.json.Decoder(Asked), msgspec.json.Encoder()
    while len(head := source.read(LENGTH.size)) == LENGTH.size:
        (length,) = LENGTH.unpack(head)
        if length > FRAME_BYTES:
            return
        asked = decoder.decode(source.read(length))
        body = encoder.encode(answered(asked))
        target.write(LENGTH.pack(len(body)) + body)
        target.flush()


def answered(asked: Asked) -> Answered:
    """One answer; whatever goes wrong is an error of the tree."""
    try:
        answer = ask(BY_PATH[asked.path], bytes(asked.body), asked.desk)
        return Answered(answer=msgspec.Raw(msgspec.json.encode(answer)))
    except HerderError as error:
        return Answered(error=error.info(), status=error.status)
    except Exception as error:  # noqa: BLE001 - the process answers for all of its questions
        failure = Internal(f"the planner failed: {type(error).__name__}: {str(error)[:200]}")
        return Answered(error=failure.info(), status=failure.status)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
