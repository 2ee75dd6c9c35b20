"""Reading an engine's HTTP/1.1 answer: the head once, then pieces of the body at the lowest cost per piece. Pure.

An engine is our own process on our own nodes, but it may be any program: what is not well-formed ends the
connection, and a body whose length is said in two ways is refused, never guessed.
Source: RFC 9112 (HTTP/1.1), sections 4 to 7.
"""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD_BYTES = 65_536
HEADERS = 128
CHUNK_LINE_BYTES = 4_096  # a chunk's size with its extensions; also one trailer line

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")


class BadAnswer(Exception):
    """What came is not an HTTP/1.1 answer."""


class Head(NamedTuple):
    """Status line and headers; names in lower case. `length` None with `is_chunked` False: until the end."""

    status: int
    headers: list[tuple[str, str]]
    length: int | None
    is_chunked: bool
    is_persistent: bool

    def get(self, name: str) -> str:
        """The first header of this name, or ""."""
        return next((value for key, value in self.headers if key == name), "")


def parse_head(data: bytes) -> Head:
    """The head up to, without, its blank line. Raises: BadAnswer."""
    lines = data.split(b"\r\n")
    match = _STATUS.fullmatch(lines[0])
    if match is None:
        raise BadAnswer("the first line is not an HTTP/1.1 status")
    if len(lines) > HEADERS:
        raise BadAnswer(f"more than {HEADERS} headers")
    status = int(match[2])
    headers = []
    length: int | None = None
    coding = ""
    connection = ""
    for line in lines[1:]:
        raw_name, colon, raw_value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(raw_name) or b"\r" in raw_value or b"\n" in raw_value or b"\0" in line:
            raise BadAnswer("a header is malformed")
        name, value = raw_name.lower().decode("ascii"), raw_value.strip(b" \t").decode("latin-1")
        headers.append((name, value))
        if name == "content-length":
            if not value.isascii() or not value.isdigit() or len(value) > 15 or length not in (None, int(value)):
                raise BadAnswer("the content length is unusable")
            length = int(value)
        elif name == "transfer-encoding":
            coding = f"{coding},{value}".strip(", ").lower()
        elif name == "connection":
            connection = f"{connection},{value.lower()}"
    if coding not in ("", "chunked") or (coding and length is not None):
        raise BadAnswer("the length of the body is said in a way that is not understood")
    if status in (204, 304):
        length, coding = 0, ""
    options = {option.strip() for option in connection.split(",")}
    is_persistent = "close" not in options and (match[1] == b"1" or "keep-alive" in options)
    return Head(status, headers, length, bool(coding), is_persistent and (bool(coding) or length is not None))


class ChunkedBody:
    """Takes a chunked body apart as it arrives."""

    __slots__ = ("_carry", "_in_trailer", "_left", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self._left = 0  # bytes of the present chunk that are still to come, with its CRLF
        self._carry = b""  # the beginning of a size line that was cut
        self._in_trailer = False

    def feed(self, data: bytes) -> bytes:
        """The payload in these bytes; `is_done` is set by the last chunk. Raises: BadAnswer, also for what follows."""
        if not self._left and not self._carry and not self._in_trailer:
            # Nearly always a piece is exactly one chunk: an engine flushes one event after the other.
            match = _CHUNK.match(data)
            if match is not None:
                start = match.end()
                size = int(match[1], 16)
                if size and start + size + 2 == len(data) and data[-2:] == b"\r\n":
                    return data[start:-2]
        return self._feed_slowly(data)

    def _feed_slowly(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        data, self._carry = self._carry + data, b""
        at = 0
        while at < len(data):
            if self.is_done:
                raise BadAnswer("bytes follow the end of the body")
            if self._left:
                at = self._take(data, at, parts)
            elif self._in_trailer:
                at = self._skip_trailer_line(data, at)
            else:
                at = self._begin_chunk(data, at)
        return b"".join(parts)

    def _take(self, data: bytes, at: int, parts: list[bytes]) -> int:
        have = min(self._left, len(data) - at)
        content = min(have, max(0, self._left - 2))
        ending = data[at + content : at + have]
        if ending != b"\r\n"[2 - (self._left - content) :][: len(ending)]:
            raise BadAnswer("a chunk does not end where it said")
        if content:
            parts.append(data[at : at + content])
        self._left -= have
        return at + have

    def _begin_chunk(self, data: bytes, at: int) -> int:
        match = _CHUNK.match(data, at)
        if match is None:
            if b"\n" in data[at:] or len(data) - at > CHUNK_LINE_BYTES:
                raise BadAnswer("a chunk's size is malformed")
            self._carry = data[at:]
            return len(data)
        size = int(match[1], 16)
        if size:
            self._left = size + 2
        else:
            self._in_trailer = True
        return match.end()

    def _skip_trailer_line(self, data: bytes, at: int) -> int:
        end = data.find(b"\r\n", at)
        if end < 0:
            if len(data) - at > CHUNK_LINE_BYTES:
                raise BadAnswer("a trailer is too long")
            self._carry = data[at:]
            return len(data)
        if end == at:
            self.is_done = True
        return end + 2
