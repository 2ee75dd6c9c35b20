"""HTTP/1.1 answers, read in any pieces: status line, headers, a body by length, in chunks or until the end.

`feed` takes what a read brought and gives back the pieces of the body in it, as far as they have come: an event at the
start of a large chunk does not wait for the rest of the chunk. Every size has a limit; whatever is not HTTP raises
ProtocolError, and the connection is then of no more use.
Source: RFC 9112.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_LINE = 8_192
MAX_HEADERS = 65_536
MAX_CHUNK = 1 << 40
MAX_SIZES = 4_096

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: .*)?", re.DOTALL)
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?", re.DOTALL)
_SIZES: dict[bytes, int] = {}  # lines that were read before: a stream repeats a few sizes thousands of times
_HEAD, _LENGTH, _SIZE, _DATA, _DATA_END, _TRAILER, _UNTIL_CLOSE, _DONE = range(8)


class ProtocolError(Exception):
    """The peer does not speak HTTP/1.1 as the standard says."""


class AnswerReader:
    """One answer on a connection; `reset` makes it ready for the next."""

    __slots__ = ("_left", "_rest", "_state", "headers", "is_head_request", "is_kept", "status")

    def __init__(self) -> None:
        self.reset()

    def reset(self, *, is_head_request: bool = False) -> None:
        """Forgets the last answer."""
        self.status = 0
        self.headers: Mapping[bytes, bytes] = {}
        self.is_kept = True
        self.is_head_request = is_head_request
        self._state = _HEAD
        self._left = 0
        self._rest = b""

    @property
    def is_done(self) -> bool:
        """The answer has wholly come."""
        return self._state == _DONE

    @property
    def leftover(self) -> bytes:
        """What came behind the answer; on a connection without pipelining nothing may."""
        return self._rest if self._state == _DONE else b""

    def whole_event(self, data: bytes) -> bytes | None:
        """The data of an event of one line, where a read is just its chunk, as nearly every read of a stream is.

        None for everything else, of which nothing has been read then.
        """
        if self._state != _SIZE or self._rest:
            return None
        begin = data.find(b"\r\n", 0, 20) + 2
        end = len(data) - 4
        if begin < 3 or data[begin : begin + 6] != b"data: ":
            return None
        size = _SIZES.get(data[: begin - 2])
        if (_size_of(data[: begin - 2]) if size is None else size) != end + 2 - begin:
            return None
        if data[end:] != b"\n\n\r\n" or data.find(b"\n", begin) != end or data.find(b"\r", begin) != end + 2:
            return None
        return data[begin + 6 : end]

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces of the body that this data completes. Raises: ProtocolError."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        elif self._state == _SIZE:
            # Nearly every read of a stream is one whole chunk of a size that was seen before.
            line_end = data.find(b"\r\n", 0, 20)
            size = _SIZES.get(data[:line_end], 0)
            if size and len(data) == line_end + size + 4 and data[-2:] == b"\r\n":
                return [data[line_end + 2 : -2]]
        pieces: list[bytes] = []
        at, end = 0, len(data)
        while at < end:
            state = self._state
            if state == _SIZE:
                line_end = data.find(b"\r\n", at, at + MAX_LINE)
                if line_end < 0:
                    self._keep_rest(data, at)
                    break
                self._begin_chunk(data[at:line_end])
                at = line_end + 2
            elif state in (_DATA, _LENGTH):
                stop = min(at + self._left, end)
                pieces.append(data[at:stop])
                self._left -= stop - at
                at = stop
                if not self._left:
                    self._state = _DATA_END if state == _DATA else _DONE
            elif state == _DATA_END:
                if end - at < 2:
                    self._rest = data[at:]
                    if self._rest != b"\r":
                        raise ProtocolError("a chunk is longer than it says")
                    break
                if data[at : at + 2] != b"\r\n":
                    raise ProtocolError("a chunk is longer than it says")
                at += 2
                self._state = _SIZE
            elif state == _UNTIL_CLOSE:
                pieces.append(data[at:] if at else data)
                at = end
            elif state == _DONE:
                self._rest = data[at:]
                break
            else:
                after = self._head(data, at) if state == _HEAD else self._trailer(data, at)
                if after < 0:
                    break
                at = after
        return pieces

    def feed_end(self) -> None:
        """The peer closed. Raises: ProtocolError when the answer was not over."""
        if self._state == _UNTIL_CLOSE:
            self._state = _DONE
        elif self._state != _DONE:
            raise ProtocolError("closed before the answer was over")

    def _keep_rest(self, data: bytes, at: int) -> None:
        if len(data) - at >= MAX_LINE:
            raise ProtocolError(f"a line of more than {MAX_LINE} bytes")
        self._rest = data[at:]

    def _begin_chunk(self, line: bytes) -> None:
        size = _SIZES.get(line)
        if size is None:
            size = _size_of(line)
        if size < 0:
            raise ProtocolError("a chunk without a size")
        if size > MAX_CHUNK:
            raise ProtocolError("a chunk of more than a tebibyte")
        self._left = size
        self._state = _DATA if size else _TRAILER

    def _trailer(self, data: bytes, at: int) -> int:
        line_end = data.find(b"\r\n", at, at + MAX_LINE)
        if line_end < 0:
            self._keep_rest(data, at)
            return -1
        self._left += line_end - at
        if self._left > MAX_HEADERS:
            raise ProtocolError(f"more than {MAX_HEADERS} bytes of trailers")
        if line_end == at:
            self._state = _DONE
        return line_end + 2

    def _head(self, data: bytes, at: int) -> int:
        head_end = data.find(b"\r\n\r\n", at)
        if head_end < 0 or head_end - at > MAX_HEADERS:
            if len(data) - at > MAX_HEADERS:
                raise ProtocolError(f"more than {MAX_HEADERS} bytes of headers")
            self._rest = data[at:]
            if not b"HTTP/1.".startswith(self._rest[:7]):
                raise ProtocolError("not an answer of HTTP/1.1")
            return -1
        lines = data[at:head_end].split(b"\r\n")
        match = _STATUS.fullmatch(lines[0])
        if match is None:
            raise ProtocolError("not an answer of HTTP/1.1")
        status = int(match[2])
        if 100 <= status < 200:
            if status == 101:
                raise ProtocolError("switches to another protocol")
            return head_end + 4
        self.status = status
        self.headers = _headers(lines[1:])
        self._choose_body(is_http_1_0=match[1] == b"0")
        return head_end + 4

    def _choose_body(self, *, is_http_1_0: bool) -> None:
        """How long the body is (RFC 9112, 6.3)."""
        connection = self.headers.get(b"connection", b"").lower()
        self.is_kept = b"keep-alive" in connection if is_http_1_0 else b"close" not in connection
        coding = self.headers.get(b"transfer-encoding")
        length = self.headers.get(b"content-length")
        if self.is_head_request or self.status in (204, 304):
            self._state = _DONE
        elif coding is not None:
            if coding.strip().lower() != b"chunked" or length is not None:
                raise ProtocolError("a body that is neither in chunks nor of a length")
            self._state = _SIZE
        elif length is not None:
            if not re.fullmatch(rb"\d{1,15}", length):
                raise ProtocolError("a content-length that is no number")
            self._left = int(length)
            self._state = _LENGTH if self._left else _DONE
        else:
            self._state, self.is_kept = _UNTIL_CLOSE, False


def _size_of(line: bytes) -> int:
    """The size that a chunk begins with, remembered for the next of the kind; -1 for a line that is none."""
    match = _CHUNK.fullmatch(line)
    if match is None:
        return -1
    size = int(match[1], 16)
    if len(_SIZES) < MAX_SIZES:
        _SIZES[line] = size
    return size


def _headers(lines: list[bytes]) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip():
            raise ProtocolError("a header without a name")
        name, value = name.lower(), value.strip()
        if name == b"content-length" and found.get(name, value) != value:
            raise ProtocolError("two lengths")
        found[name] = value if name not in found or name == b"content-length" else found[name] + b", " + value
    return found
