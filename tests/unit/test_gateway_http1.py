"""Reading an engine's answer: any cut of the bytes gives the same answer, and nothing ambiguous passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from head.gateway.http1 import BadAnswer, ChunkedBody, parse_head

OK = b"HTTP/1.1 200 OK\r\n"


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes in pieces."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def feed_all(body: ChunkedBody, parts: Iterable[bytes]) -> None:
    """Hands all pieces over."""
    for part in parts:
        body.feed(part)


class TestHead:
    def test_reads_status_and_headers(self) -> None:
        """Names are lower case, values stripped, the status a number."""
        head = parse_head(OK + b"Content-Type:  text/plain \r\nContent-Length: 12")
        assert (head.status, head.length, head.is_chunked, head.is_persistent) == (200, 12, False, True)
        assert head.get("content-type") == "text/plain"
        assert head.get("missing") == ""

    def test_reason_may_be_missing(self) -> None:
        """A status line without a reason is fine."""
        assert parse_head(b"HTTP/1.1 404\r\nContent-Length: 0").status == 404

    @pytest.mark.parametrize(
        ("lines", "is_persistent"),
        [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 1", True),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: Close", False),
            (b"HTTP/1.0 200 OK\r\nContent-Length: 1", False),
            (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive", True),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked", True),
            (b"HTTP/1.1 200 OK", False),
        ],
    )
    def test_persistence(self, lines: bytes, is_persistent: bool) -> None:
        """A connection is used again only when both sides know where the body ends."""
        assert parse_head(lines).is_persistent is is_persistent

    @pytest.mark.parametrize("status", [204, 304])
    def test_statuses_without_a_body(self, status: int) -> None:
        """These never have a body, whatever their headers say."""
        head = parse_head(b"HTTP/1.1 %d X\r\nTransfer-Encoding: chunked" % status)
        assert (head.length, head.is_chunked) == (0, False)

    @pytest.mark.parametrize(
        "data",
        [
            b"SSH-2.0-OpenSSH",
            b"HTTP/2 200 OK",
            b"HTTP/1.1 99 X",
            OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked",
            OK + b"Content-Length: 5\r\nContent-Length: 6",
            OK + b"Content-Length: +5",
            OK + b"Content-Length: 5, 5",
            OK + "Content-Length: ٥".encode(),
            OK + b"Transfer-Encoding: gzip, chunked",
            OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            OK + b"Bad Name: x",
            OK + b": x",
            OK + b"no colon",
            OK + b"X: a\nInjected: b",
            OK + b" folded",
            OK + b"X: y\r\n" * 200,
        ],
    )
    def test_ambiguity_is_refused(self, data: bytes) -> None:
        """What two readers could read in two ways is no answer."""
        with pytest.raises(BadAnswer):
            parse_head(data)


class TestChunkedBody:
    @given(
        pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
        places=st.lists(st.integers(0, 10_000), max_size=12),
        extension=st.sampled_from([b"", b";a=b", b" "]),
        trailer=st.sampled_from([b"", b"X-Sum: 1\r\n"]),
    )
    def test_any_cut_gives_the_same_payload(
        self, pieces: list[bytes], places: list[int], extension: bytes, trailer: bytes
    ) -> None:
        """However the bytes are cut on their way, the payload is the same and its end is found."""
        data = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
        data += b"0%b\r\n%b\r\n" % (extension, trailer)
        body = ChunkedBody()
        got = []
        for part in cuts(data, places):
            assert not body.is_done
            got.append(body.feed(part))
        assert body.is_done
        assert b"".join(got) == b"".join(pieces)

    @given(places=st.lists(st.integers(0, 10_000), max_size=8))
    def test_bytes_after_the_end_are_refused(self, places: list[int]) -> None:
        """A second answer smuggled behind the first is noticed."""
        body = ChunkedBody()
        with pytest.raises(BadAnswer):
            feed_all(body, cuts(b"1\r\na\r\n0\r\n\r\nHTTP/1.1 200 OK", places))

    @pytest.mark.parametrize(
        "data",
        [b"g\r\n", b"-1\r\na", b"\r\n", b"1\r\nab\r\n", b"1\r\na\rx", b"1\na\n", b"+1\r\na\r\n", b"123456789\r\n"],
    )
    def test_malformed_chunks_are_refused(self, data: bytes) -> None:
        """A size or an ending that is not well-formed ends the reading."""
        with pytest.raises(BadAnswer):
            ChunkedBody().feed(data)

    def test_endless_size_line_is_refused(self) -> None:
        """A size line cannot be used to fill memory."""
        body = ChunkedBody()
        with pytest.raises(BadAnswer):
            feed_all(body, [b"1;", *[b"x" * 1_000] * 100])

    def test_endless_trailer_is_refused(self) -> None:
        """Nor can a trailer."""
        body = ChunkedBody()
        with pytest.raises(BadAnswer):
            feed_all(body, [b"0\r\n", *[b"x" * 1_000] * 100])
