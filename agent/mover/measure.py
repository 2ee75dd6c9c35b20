"""Files whose size nobody says beforehand: read once to its end to learn it, then fetched like any other.

Twice the traffic, but space is promised before the first byte is stored and a cut is seen; only answers in chunked
coding without a Content-Length come here, and those are small generated files in practice.
"""

from __future__ import annotations

import threading

import msgspec

from agent.mover.sources import Origin, RemoteFile
from common.errors import Cancelled, SourceRefused


def measured(origin: Origin, file: RemoteFile, cancelled: threading.Event) -> RemoteFile:
    """The file with its size. Raises: SourceFailed, SourceRefused, Cancelled."""
    connection = origin.connect()
    size = 0
    buffer = memoryview(bytearray(1 << 20))
    try:
        stream = connection.open(file, 0, -1)
        try:
            validator = file.validator or stream.validator
            if not validator and not file.sha256:
                raise SourceRefused(f"{file.path}: neither size nor ETag is given, so nothing could be verified")
            while count := stream.readinto(buffer):
                if cancelled.is_set():
                    raise Cancelled("stopped on request")
                size += count
        finally:
            stream.close()
    finally:
        connection.close()
    return msgspec.structs.replace(file, size=size, validator=validator)
