"""The planner as a process of its own: questions in, answers out, one after the other, over stdin and stdout.

A search computes for a second; in the head's process it would hold up heartbeats. Frames are a 4-byte length (big
endian) and JSON: `Asked` in, `Answered` out. The process ends with its stdin. Its argument, where it has one, is the
file of the cluster's own calibration, which it reads once; a file that cannot be used is named in every answer.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from common.errors import ErrorInfo, HerderError, Internal
from head.planner.calibration.active import Active
from head.planner.calibration.own import FILE_BYTES, read
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


def own_calibration(path: Path) -> Active | None:
    """The calibration in a file; None without one. Of a file that cannot be used, the reason stands for its name."""
    try:
        return read(_content(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or "it cannot be read"
    except HerderError as error:
        reason = error.message
    return Active(name=f"the shipped one: {path.name} is not used, {reason}")


def _content(path: Path) -> bytes:
    """The plain file's bytes, one more than are allowed at most. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(None, "it is no plain file")
        return file.read(FILE_BYTES + 1)


def serve(source: BinaryIO, target: BinaryIO, own: Active | None = None) -> None:
    """Answers until the source ends."""
    decoder, encoder = msgspec.json.Decoder(Asked), msgspec.json.Encoder()
    while len(head := source.read(LENGTH.size)) == LENGTH.size:
        (length,) = LENGTH.unpack(head)
        if length > FRAME_BYTES:
            return
        asked = decoder.decode(source.read(length))
        body = encoder.encode(answered(asked, own))
        target.write(LENGTH.pack(len(body)) + body)
        target.flush()


def answered(asked: Asked, own: Active | None = None) -> Answered:
    """One answer; whatever goes wrong is an error of the tree."""
    try:
        answer = ask(BY_PATH[asked.path], bytes(asked.body), asked.desk, own)
        return Answered(answer=msgspec.Raw(msgspec.json.encode(answer)))
    except HerderError as error:
        return Answered(error=error.info(), status=error.status)
    except Exception as error:  # noqa: BLE001 - the process answers for all of its questions
        failure = Internal(f"the planner failed: {type(error).__name__}: {str(error)[:200]}")
        return Answered(error=failure.info(), status=failure.status)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, own_calibration(Path(sys.argv[1])) if sys.argv[1:] else None)
